"""Tokenizers of both kinds, and chat templates that behave as those of real models do.

Each template is our own, short, and named for the family whose habits it has: what it does with a
system turn, whether it trims, thinks or prints a date, and which token ends a turn.
"""
import functools
import json
import re
from dataclasses import dataclass

import transformers
from tokenizers import (AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        trainers)

from common import readouts
from common.prompts import NEUTRAL
from common.texts import load_clauses

CORPUS = [NEUTRAL, readouts.OPTIONS, "Why is this wrong? This is wrong because it is. Answer: (A)",
          "You care about people. You obey authority. I would help her first, then the others.",
          *(f"({letter}) {letter}" for letter in "ABCDEFG"),
          *(wording for wordings in load_clauses().values() for wording in wordings)] * 3


def byte_level():
    """As GPT-2's, Llama 3's and Qwen's: bytes, a space belongs to the word after it."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    return tok


def sentencepiece():
    """As Llama 2's: every text begins with the mark of a new word, unknown letters become bytes."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # words, for training
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=256 + 260, special_tokens=["<unk>", *bytes_], show_progress=False))
    described = json.loads(tok.to_str())
    described["added_tokens"] = []  # the bytes are plain pieces
    tok = Tokenizer.from_str(json.dumps(described))
    tok.pre_tokenizer = None
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tok


@dataclass
class Habits:
    template: str
    begins: str  # what the rendered prompt ends with, where the assistant's words begin
    ends: str  # the token that ends its turn, or several, a space between them
    kind: str = "bytes"
    eos: str = "<eos>"
    has_marks: bool = True  # its roles are tokens
    in_user_turn: bool = False  # the system text stands in the user's turn
    escapes: bool = False  # texts are shown as JSON strings

    @property
    def marks(self):
        """The tokens that only the template names."""
        found = re.findall(r"<\|\w+\|>|<\w+_of_\w+>|\[/?[A-Zg]+\]", self.template)
        return list(dict.fromkeys(found)) if self.has_marks else []


END = "{%- endif -%}"
NL = "{{ '\\n' }}"
CONTENT, TRIMMED = "{{ m.content }}", "{{ m.content | trim }}"


def turns(before="", system="", user="", assistant="", prompt="", after=END):
    """A template of one line per role, in order."""
    roles = "".join(
        f"{{%- {'if' if k == 0 else 'elif'} m.role == '{role}' -%}}{text}"
        for k, (role, text) in enumerate([("system", system), ("user", user),
                                          ("assistant", assistant)]))
    return (f"{before}{{%- for m in messages -%}}{roles}{{%- endif -%}}{{%- endfor -%}}"
            f"{{%- if add_generation_prompt -%}}{prompt}{after}")


def im(role, before=""):
    return f"<|im_start|>{role}{NL}{before}{CONTENT}<|im_end|>{NL}"


def chatml(system=im("system"), thought="", opened="", begins="", **kwargs):
    """Of the ChatML family: a stop that is the tokenizer's end token."""
    template = turns(system=system, user=im("user"), assistant=im("assistant", thought),
                     prompt=f"<|im_start|>assistant{NL}{opened}")
    return Habits(template, "<|im_start|>assistant\n" + begins, "<|im_end|>", eos="<|im_end|>",
                  **kwargs)


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>{NL}{NL}"


THOUGHT, RENDERED = "<think>{{ '\\n\\n' }}</think>{{ '\\n\\n' }}", "<think>\n\n</think>\n\n"
SWITCH = f"{{%- if enable_thinking is false -%}}{THOUGHT}{END}"
CHATS = {
    "chatml": chatml(),
    # it drops the system turn
    "drops": chatml(system="", in_user_turn=True),
    # a thinking switch; the block stays in the last turn
    "qwen3": chatml(thought="{%- if loop.last -%}" + THOUGHT + END, opened=SWITCH, begins=RENDERED),
    # a thinking switch; the block is in no turn
    "granite": chatml(opened=SWITCH, begins=RENDERED),
    # it always thinks; the last turn has the block
    "qwen3-thinking": chatml(thought=THOUGHT, opened=f"<think>{NL}", begins=RENDERED),
    # it always thinks; no turn has the block
    "r1": Habits(turns(
        before="<bos>", system=CONTENT, user="<|User|>" + CONTENT,
        assistant=f"<|Assistant|>{CONTENT}<eos>", prompt=f"<|Assistant|><think>{NL}"),
        "<|Assistant|>" + RENDERED, "<eos>"),
    # today's date, everything trimmed
    "llama3": Habits(turns(
        before=f"<bos>{header('system')}Today: {{{{ date_string or strftime_now('%d %b %Y') }}}}"
               + NL + "{{ messages[0].content | trim if messages[0].role == 'system' }}<|eot_id|>",
        user=f"{header('user')}{TRIMMED}<|eot_id|>",
        assistant=f"{header('assistant')}{TRIMMED}<|eot_id|>", prompt=header("assistant")),
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", eos="<|end_of_text|>"),
    # channels, another end for the last turn, a date
    "gpt-oss": Habits(turns(
        before="<|start|>system<|message|>{{ strftime_now('%Y-%m-%d') }}<|end|>",
        system=f"<|start|>developer<|message|>{CONTENT}<|end|>",
        user=f"<|start|>user<|message|>{CONTENT}<|end|>",
        assistant=f"<|start|>assistant<|channel|>final<|message|>{CONTENT}"
                  "{{ '<|return|>' if loop.last else '<|end|>' }}", prompt="<|start|>assistant"),
        "<|start|>assistant<|channel|>final<|message|>", "<|return|>", eos="<|return|>"),
    # an unnamed stop, followed by the end token where no answer is asked for
    "phi4-mini": Habits(turns(
        system=f"<|system|>{CONTENT}<|end|>", user=f"<|user|>{CONTENT}<|end|>",
        assistant=f"<|assistant|>{CONTENT}<|end|>", prompt="<|assistant|>",
        after="{%- else -%}<eos>" + END),
        "<|assistant|>", "<|end|>"),
    # only the next turn's role ends a turn
    "glm": Habits(turns(
        before="[gMASK]", system=f"<|system|>{NL}{CONTENT}", user=f"<|user|>{NL}{CONTENT}",
        assistant=f"<|assistant|>{NL}<think></think>{NL}{CONTENT}",
        prompt=f"<|assistant|>{NL}<think></think>"),
        "<|assistant|>\n<think></think>\n", "<|user|>"),
    # two tokens end a turn, another opens the answer
    "command-r7b": Habits(turns(
        before="<bos>", system=f"<|START_OF_TURN|><|SYSTEM|>{CONTENT}<|END_OF_TURN|>",
        user=f"<|START_OF_TURN|><|USER|>{CONTENT}<|END_OF_TURN|>",
        assistant=f"<|START_OF_TURN|><|CHATBOT|><|START_RESPONSE|>{CONTENT}<|END_RESPONSE|>"
                  "<|END_OF_TURN|>", prompt="<|START_OF_TURN|><|CHATBOT|>"),
        "<|CHATBOT|><|START_RESPONSE|>", "<|END_RESPONSE|> <|END_OF_TURN|>", eos="<|END_OF_TURN|>"),
    # every text as a JSON string
    "tojson": Habits(turns(
        before="<bos>", system="<|system|>{{ m.content | tojson }}<|end|>",
        user="<|user|>{{ m.content | tojson }}<|end|>",
        assistant=f"<|assistant|>{CONTENT}<|end|>", prompt="<|assistant|>"),
        "<|assistant|>", "<|end|>", escapes=True),
    # content as a list of parts, a string is shown as nothing: SmolVLM, LLaVA-NeXT
    "idefics3": Habits(
        "<bos>{%- for m in messages -%}{{ m.role | capitalize }}: "
        "{%- for part in m.content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}"
        "{%- endfor -%}<end_of_utterance>{{ '\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}Assistant:{%- endif -%}",
        "Assistant:", "<end_of_utterance>"),
    # a start token inside, system in front of the user's words, a role of another name, trimming
    "gemma3": Habits(
        "<bos>{%- set ns = namespace(first='') -%}{%- for m in messages -%}"
        "{%- if m.role == 'system' -%}{%- set ns.first = m.content + '\\n\\n' -%}{%- else -%}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}{{ '\\n' }}"
        "{{ ns.first }}{%- set ns.first = '' -%}{{ m.content | trim }}<end_of_turn>{{ '\\n' }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<start_of_turn>model{{ '\\n' }}{%- endif -%}",
        "<start_of_turn>model\n", "<end_of_turn>", "pieces", in_user_turn=True),
    # it refuses a system turn
    "gemma2": Habits(turns(
        before="<bos>", system="{{ raise_exception('System role not supported') }}",
        user=f"<start_of_turn>user{NL}{TRIMMED}<end_of_turn>{NL}",
        assistant=f"<start_of_turn>model{NL}{TRIMMED}<end_of_turn>{NL}",
        prompt=f"<start_of_turn>model{NL}"),
        "<start_of_turn>model\n", "<end_of_turn>", "pieces", in_user_turn=True),
    # no token for a role, spaces around the words
    "llama2": Habits(
        "{%- set ns = namespace(first='') -%}{%- for m in messages -%}{%- if m.role == 'system' -%}"
        "{%- set ns.first = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' -%}"
        "{%- elif m.role == 'user' -%}<bos>[INST] {{ ns.first + m.content | trim }} [/INST]"
        "{%- set ns.first = '' -%}{%- else -%}{{ ' ' + m.content | trim + ' ' }}<eos>{%- endif -%}"
        "{%- endfor -%}", "[/INST]", "<eos>", "pieces", has_marks=False, in_user_turn=True),
    # the system text goes to the last turn, if that is the user's; roles must alternate
    "mistral": Habits(
        "<bos>{%- set ns = namespace(first='', turn=0) -%}{%- for m in messages -%}"
        "{%- if m.role == 'system' -%}{%- set ns.first = m.content ~ '\\n\\n' -%}{%- else -%}"
        "{%- if (m.role == 'user') != (ns.turn % 2 == 0) -%}{{ raise_exception('alternate') }}"
        "{%- endif -%}{%- set ns.turn = ns.turn + 1 -%}"
        "{%- if m.role == 'user' -%}[INST] {{ (ns.first if loop.last) ~ m.content }}[/INST]"
        "{%- else -%}{{ ' ' + m.content }}<eos>{%- endif -%}{%- endif -%}{%- endfor -%}",
        "[/INST]", "<eos>", "pieces", in_user_turn=True),
    # plain words and no token at all
    "plain": Habits(turns(
        system=CONTENT, user=f"{NL}### User:{NL}{CONTENT}",
        assistant=f"{NL}### Reply:{NL}{CONTENT}", prompt=f"{NL}### Reply:{NL}"),
        "### Reply:\n", "<eos>", "pieces", has_marks=False),
}


@functools.cache
def tokenizer(name):
    """A tokenizer with this template, as `AutoTokenizer` would give it. Tests leave it as it is."""
    habits = CHATS[name]
    backend = byte_level() if habits.kind == "bytes" else sentencepiece()
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=habits.eos, pad_token=habits.eos,
        chat_template=habits.template)
    tok.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in habits.marks])
    return tok
