"""What a chat template makes of a user turn, a system turn and an answer; where an answer ends.

    chat = Chat(tok)                                          # a tokenizer with its chat template
    chat.ids("What should I do?", system="You are kind.")     # up to where the answer begins
    chat.end_of_turn()                                        # the tokens that end an answer

Templates differ: some refuse a system turn, print today's date, open a block for thinking or a
channel for the answer, or take content as a list of parts. The form is detected once, with plain
words, so that quotes or line breaks in a persona cannot change it.
"""
import contextlib
import json
import os
import re
from dataclasses import dataclass
from datetime import date

NEUTRAL = "You are a helpful assistant."
DATE = "2026-01-01"  # what chat templates print as today's: the same prompts on any day
MARK = "\u241f"  # stands for an answer's words; merges with nothing


def dated(template: str, today: date) -> str:
    """The chat template, with `today` in the place of its `strftime_now`: a macro of that name.

    transformers lets no function of ours into a template.
    """
    rendered = "form"
    for code in ("Y", "y", "B", "b", "m", "-m", "d", "-d", "A", "a", "j", "H", "M", "S"):
        rendered += f" | replace('%{code}', '{today.strftime('%' + code)}')"
    return "{%- macro strftime_now(form) -%}{{ " + rendered + " }}{%- endmacro -%}" + template


@dataclass
class Chat:
    """A tokenizer, and the date that its chat template prints as today's.

    Raises ValueError for a template that does not show the words it is given.
    """
    tok: object
    date: str = DATE

    def __post_init__(self):
        self.template = dated(self.tok.get_chat_template(), date.fromisoformat(self.date))
        # strings or parts as content, a system turn or the system text before the user's: the
        # first combination that shows both texts
        for self.as_parts in (False, True):
            for self.system_turn in (True, False):
                with contextlib.suppress(Exception):  # templates refuse in words of their own
                    rendered = self.render(self.turns("user words", "system words"))
                    shown = "user words" in rendered and "system words" in rendered
                    if shown and "'type'" not in rendered:  # else the parts are printed as Python
                        return
        raise ValueError("the chat template does not show the user's and the system's words; "
                         "fix: take the template that the model's authors publish")

    def turns(self, user: str, system: str, answer: str | None = None) -> list[dict]:
        """The messages of one conversation, in the form that this template takes."""
        if self.system_turn:
            texts = [("system", system), ("user", user)]
        else:
            texts = [("user", f"{system}\n\n{user}")]
        if answer is not None:
            texts.append(("assistant", answer))
        if self.as_parts:
            return [{"role": role, "content": [{"type": "text", "text": t}]} for role, t in texts]
        return [{"role": role, "content": t} for role, t in texts]

    def render(self, turns: list[dict], open_answer: bool = True) -> str:
        """The template's text; open_answer: up to the assistant tag. Thinking is switched off."""
        return self.tok.apply_chat_template(turns, chat_template=self.template, tokenize=False,
                                            add_generation_prompt=open_answer,
                                            enable_thinking=False)

    def text(self, user: str, system: str = NEUTRAL) -> str:
        """One user turn as the chat template renders it, up to where the answer's words begin.

        An open thinking block is closed, a channel for the answer (GPT-OSS) is opened.
        Raises ValueError for an empty user text, or one that the template does not show.
        """
        user, system = user.strip(), system.strip()  # templates trim them, and they are looked for
        if not user:
            raise ValueError("empty prompt; fix: give at least one word")
        turns = self.turns(user, system)
        text = self.render(turns)
        for words in (user, system):
            escaped = json.dumps(words, ensure_ascii=False)[1:-1]  # as `tojson` shows them
            if words not in text and escaped not in text:
                raise ValueError(f"the chat template does not show {words[:40]!r}; fix: other "
                                 "words, or the template that the model's authors publish")

        # a marked answer shows what the template itself puts before an answer's words
        with contextlib.suppress(Exception):  # some refuse a conversation that ends so
            answered = self.render(self.turns(user, system, MARK), open_answer=False)
            answered = answered.rpartition(MARK)[0]
            if answered.startswith(text) and answered[len(text):].strip(" "):
                return answered  # it puts more: a channel, a line break after </think>
            thinks = re.search(r"<(\w+)>\s*$", text.removeprefix(answered))
            if answered and text.startswith(answered) and thinks:  # it puts less: an open <think>
                return f"{text.rstrip()}\n\n</{thinks[1]}>\n\n"
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text, which has its special tokens in it."""
        return self.tok(text, add_special_tokens=False).input_ids

    def ids(self, user: str, system: str = NEUTRAL) -> list[int]:
        """The token ids of `text`, whose end, the assistant tag, is where steering begins."""
        return self.encode(self.text(user, system))

    def decode(self, tokens: list[int]) -> str:
        """The words of an answer, without special tokens."""
        return self.tok.decode(tokens, skip_special_tokens=True)

    def suffix_ids(self, before: str, text: str) -> list[int]:
        """The token ids of `text` as it stands after `before`.

        Tokenised alone it might begin with the mark of a new word (SentencePiece). Where a token
        would straddle the boundary, `text` is taken from behind a symbol that merges with nothing.
        Raises ValueError for a tokenizer that merges even with that.
        """
        for context in (before, MARK):
            prefix, ids = self.encode(context), self.encode(context + text)
            if ids[:len(prefix)] == prefix:
                return ids[len(prefix):]
        raise ValueError(f"the tokenizer cannot split {text[:40]!r} from what stands before it; "
                         "fix: another start of the answer")

    def end_of_turn(self) -> list[int]:
        """The tokens that end an assistant turn; sampling stops at the last of them.

        The tokens after an answer, both at the end and before another user turn. In some (GLM)
        nothing ends it but the next turn's first token; without either, the end token.
        """
        turns = self.turns("a", NEUTRAL, MARK)
        after = [self.render(conversation, open_answer=False).rpartition(MARK)[2]
                 for conversation in (turns, turns + turns[-2:-1])]
        added = self.tok.added_tokens_decoder  # also what only the template names, as Gemma's
        for text, n in ((os.path.commonprefix(after), None), (after[0], 1), (after[1], 1)):
            ends = [t for t in self.encode(text) if t in added and t != self.tok.bos_token_id][:n]
            if ends:
                return ends
        return [] if self.tok.eos_token_id is None else [self.tok.eos_token_id]


def stop_tokens(model, chat: Chat) -> list[int]:
    """The tokens that end an answer: the generation config's, the tokenizer's, the template's.

    A fine-tune may lack any of them.
    """
    stop = model.generation_config.eos_token_id
    stop = [stop] if isinstance(stop, int) else list(stop or [])
    stop += chat.end_of_turn()[-1:]
    if chat.tok.eos_token_id is not None:
        stop.append(chat.tok.eos_token_id)
    return list(dict.fromkeys(stop))
