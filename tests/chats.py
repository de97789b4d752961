"""Tokenizers of both kinds, and chat templates that behave as those of real models do.

Each template is our own, short, and named for the family whose habits it has: what it does with a
system turn, whether it trims, thinks or prints a date, and which token ends a turn.
"""
import functools
import json
from dataclasses import dataclass

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from common import readouts
from steer import NEUTRAL

CORPUS = [NEUTRAL, readouts.OPTIONS, "Why is this wrong? This is wrong because it is. Answer: (A) (B)",
          "You care about people. You obey authority. I would help her first, and then the others.",
          *(f"({letter}) {letter}" for letter in "ABCDEFG")] * 3


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
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
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
class Chat:
    template: str
    begins: str  # what the rendered prompt ends with, where the assistant's words begin
    ends: str  # the token that ends its turn
    kind: str = "bytes"
    eos: str = "<eos>"
    marks: tuple[str, ...] = ()  # tokens that only the template names
    in_user_turn: bool = False  # the system text stands in the user's turn
    trims: bool = False


def turns(before="", system="", user="", assistant="", prompt="", after=""):
    """A template of one line per role, in order."""
    roles = "".join(
        f"{{%- {'if' if k == 0 else 'elif'} m.role == '{role}' -%}}{text}"
        for k, (role, text) in enumerate([("system", system), ("user", user),
                                          ("assistant", assistant)]))
    return (f"{before}{{%- for m in messages -%}}{roles}{{%- endif -%}}{{%- endfor -%}}"
            f"{{%- if add_generation_prompt -%}}{prompt}{after}")


CONTENT = "{{ m.content }}"
TRIMMED = "{{ m.content | trim }}"
END = "{%- endif -%}"
REFUSE = "{{ raise_exception('System role not supported') }}"
NL = "{{ '\\n' }}"


def im(role, content=CONTENT):
    return f"<|im_start|>{role}{NL}{content}<|im_end|>{NL}"


def header(role, content):
    return f"<|start_header_id|>{role}<|end_header_id|>{NL}{NL}{content}<|eot_id|>"


ASSISTANT = "<|im_start|>assistant\n"
THOUGHT = "<think>{{ '\\n\\n' }}</think>{{ '\\n\\n' }}"
CHATS = {
    # a system turn, a stop that is the tokenizer's end token
    "chatml": Chat(turns(
        system=im("system"), user=im("user"), assistant=im("assistant"),
        prompt=f"<|im_start|>assistant{NL}", after=END),
        ASSISTANT, "<|im_end|>", eos="<|im_end|>", marks=("<|im_start|>",)),
    # it drops the system turn
    "drops": Chat(turns(
        user=im("user"), assistant=im("assistant"),
        prompt=f"<|im_start|>assistant{NL}", after=END),
        ASSISTANT, "<|im_end|>", eos="<|im_end|>", marks=("<|im_start|>",), in_user_turn=True),
    # today's date, everything trimmed
    "llama3": Chat(turns(
        before="<bos><|start_header_id|>system<|end_header_id|>{{ '\\n\\n' }}Today: "
               "{{ date_string or strftime_now('%d %b %Y') }}{{ '\\n\\n' }}"
               "{{ messages[0].content | trim if messages[0].role == 'system' }}<|eot_id|>",
        user=header("user", TRIMMED), assistant=header("assistant", TRIMMED),
        prompt=f"<|start_header_id|>assistant<|end_header_id|>{NL}{NL}", after=END),
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", eos="<|end_of_text|>",
        marks=("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), trims=True),
    # a thinking switch; the block stays in the last turn
    "qwen3": Chat(turns(
        system=im("system"), user=im("user"),
        assistant=f"<|im_start|>assistant{NL}{{%- if loop.last -%}}{THOUGHT}{END}{CONTENT}"
                  f"<|im_end|>{NL}",
        prompt=f"<|im_start|>assistant{NL}{{%- if enable_thinking is false -%}}{THOUGHT}{END}",
        after=END),
        ASSISTANT + "<think>\n\n</think>\n\n", "<|im_end|>", eos="<|im_end|>",
        marks=("<|im_start|>",)),
    # a thinking switch; the block is in no turn
    "granite": Chat(turns(
        system=im("system"), user=im("user"), assistant=im("assistant"),
        prompt=f"<|im_start|>assistant{NL}{{%- if enable_thinking is false -%}}{THOUGHT}{END}",
        after=END),
        ASSISTANT + "<think>\n\n</think>\n\n", "<|im_end|>", eos="<|im_end|>",
        marks=("<|im_start|>",)),
    # it always thinks; the last turn has the block
    "qwen3-thinking": Chat(turns(
        system=im("system"), user=im("user"),
        assistant=f"<|im_start|>assistant{NL}{THOUGHT}{CONTENT}<|im_end|>{NL}",
        prompt=f"<|im_start|>assistant{NL}<think>{NL}", after=END),
        ASSISTANT + "<think>\n\n</think>\n\n", "<|im_end|>", eos="<|im_end|>",
        marks=("<|im_start|>",)),
    # it always thinks; no turn has the block
    "r1": Chat(turns(
        before="<bos>", system=CONTENT, user="<|User|>" + CONTENT,
        assistant=f"<|Assistant|>{CONTENT}<eos>", prompt=f"<|Assistant|><think>{NL}", after=END),
        "<|Assistant|><think>\n\n</think>\n\n", "<eos>", marks=("<|User|>", "<|Assistant|>")),
    # channels, another end for the last turn, a date
    "gpt-oss": Chat(turns(
        before="<|start|>system<|message|>{{ strftime_now('%Y-%m-%d') }}<|end|>",
        system=f"<|start|>developer<|message|>{CONTENT}<|end|>",
        user=f"<|start|>user<|message|>{CONTENT}<|end|>",
        assistant=f"<|start|>assistant<|channel|>final<|message|>{CONTENT}"
                  "{{ '<|return|>' if loop.last else '<|end|>' }}",
        prompt="<|start|>assistant", after=END),
        "<|start|>assistant<|channel|>final<|message|>", "<|return|>", eos="<|return|>",
        marks=("<|start|>", "<|message|>", "<|channel|>", "<|end|>")),
    # an unnamed stop, followed by the end token where no answer is asked for
    "phi4-mini": Chat(turns(
        system=f"<|system|>{CONTENT}<|end|>", user=f"<|user|>{CONTENT}<|end|>",
        assistant=f"<|assistant|>{CONTENT}<|end|>", prompt="<|assistant|>",
        after="{%- else -%}<eos>" + END),
        "<|assistant|>", "<|end|>", marks=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    # only the next turn's role ends a turn
    "glm": Chat(turns(
        before="[gMASK]", system=f"<|system|>{NL}{CONTENT}", user=f"<|user|>{NL}{CONTENT}",
        assistant=f"<|assistant|>{NL}<think></think>{NL}{CONTENT}",
        prompt=f"<|assistant|>{NL}<think></think>", after=END),
        "<|assistant|>\n<think></think>", "<|user|>",
        marks=("[gMASK]", "<|system|>", "<|user|>", "<|assistant|>")),
    # a start token inside, system in front of the user's words, a role of another name, trimming
    "gemma3": Chat(
        "<bos>{%- set ns = namespace(first='') -%}{%- for m in messages -%}"
        "{%- if m.role == 'system' -%}{%- set ns.first = m.content + '\\n\\n' -%}{%- else -%}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}{{ '\\n' }}"
        "{{ ns.first }}{%- set ns.first = '' -%}{{ m.content | trim }}<end_of_turn>{{ '\\n' }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<start_of_turn>model{{ '\\n' }}{%- endif -%}",
        "<start_of_turn>model\n", "<end_of_turn>", "pieces",
        marks=("<start_of_turn>", "<end_of_turn>"), in_user_turn=True, trims=True),
    # it refuses a system turn
    "gemma2": Chat(turns(
        before="<bos>", system=REFUSE, user=f"<start_of_turn>user{NL}{TRIMMED}<end_of_turn>{NL}",
        assistant=f"<start_of_turn>model{NL}{TRIMMED}<end_of_turn>{NL}",
        prompt=f"<start_of_turn>model{NL}", after=END),
        "<start_of_turn>model\n", "<end_of_turn>", "pieces",
        marks=("<start_of_turn>", "<end_of_turn>"), in_user_turn=True, trims=True),
    # no token for a role, spaces around the words
    "llama2": Chat(
        "{%- set ns = namespace(first='') -%}{%- for m in messages -%}"
        "{%- if m.role == 'system' -%}{%- set ns.first = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n'"
        " -%}{%- elif m.role == 'user' -%}<bos>[INST] {{ ns.first + m.content | trim }} [/INST]"
        "{%- set ns.first = '' -%}{%- else -%}{{ ' ' + m.content | trim + ' ' }}<eos>{%- endif -%}"
        "{%- endfor -%}", "[/INST]", "<eos>", "pieces", in_user_turn=True, trims=True),
    # the system text goes to the last turn, if that is the user's; roles must alternate
    "mistral": Chat(
        "<bos>{%- set ns = namespace(first='', turn=0) -%}{%- for m in messages -%}"
        "{%- if m.role == 'system' -%}{%- set ns.first = m.content + '\\n\\n' -%}{%- else -%}"
        "{%- if (m.role == 'user') != (ns.turn % 2 == 0) -%}{{ raise_exception('alternate') }}"
        "{%- endif -%}{%- set ns.turn = ns.turn + 1 -%}"
        "{%- if m.role == 'user' -%}[INST] {{ (ns.first if loop.last else '') + m.content }}[/INST]"
        "{%- else -%}{{ ' ' + m.content }}<eos>{%- endif -%}{%- endif -%}{%- endfor -%}",
        "[/INST]", "<eos>", "pieces", marks=("[INST]", "[/INST]"), in_user_turn=True),
    # plain words and no token at all
    "plain": Chat(turns(
        system=CONTENT, user=f"{NL}### User:{NL}{CONTENT}", assistant=f"{NL}### Reply:{NL}{CONTENT}",
        prompt=f"{NL}### Reply:{NL}", after=END), "### Reply:\n", "<eos>", "pieces"),
}


@functools.cache
def tokenizer(name):
    """A tokenizer with this template, as `AutoTokenizer` would give it. Tests leave it as it is."""
    chat = CHATS[name]
    backend = byte_level() if chat.kind == "bytes" else sentencepiece()
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=chat.eos, pad_token=chat.eos,
        chat_template=chat.template)
    tok.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in chat.marks])
    return tok
