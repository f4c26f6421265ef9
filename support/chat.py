"""Tokenizers and chat formats: messages to ids and back.
"""
import re
from pathlib import Path

from tokenizers import Tokenizer

from support.files import UserError, read_json, shorten


def load_tokenizer(path):
    """tokenizer.json of a model folder, set so that special tokens in a user's text stay text."""
    file = Path(path) / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{file}: no such file; download the tokenizer's files beside the weights")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises plain Exception, and its panics are not even that
        raise UserError(f"{file}: not a tokenizer ({shorten(str(error), 300)})") from None
    check_ids(tokenizer, file)
    tokenizer.encode_special_tokens = True  # "<|eot_id|>" typed by someone is nine characters, not the end of a turn
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_ids(tokenizer, file):
    """UserError if the model beside a tokenizer, where there is one, is not that tokenizer's."""
    config = file.with_name("config.json")
    size = read_json(config).get("vocab_size") if config.exists() else None
    if type(size) is not int:  # nothing to compare with
        return
    token, largest = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1], default=("", -1))
    if largest >= size:
        raise UserError(f"{file}: {token!r} has the id {largest}, but config.json says {size} tokens (vocab_size): is "
                        "this another model's tokenizer?")
    special = tokenizer.get_added_tokens_decoder()
    for eos in end_ids(config):
        if eos not in special:
            raise UserError(f"{file}: {eos}, eos_token_id of config.json, is {tokenizer.id_to_token(eos)!r} here and "
                            "no special token: is this another model's tokenizer?")


def end_ids(file):
    """eos_token_id of a JSON file as a set of numbers: none, one or several are given."""
    eos = read_json(file).get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(e) is int and 0 <= e < 2**31 for e in eos):
        raise UserError(f"{file}: eos_token_id is {shorten(eos)}, expected a number or a list of numbers")
    return set(eos)


def encode(tokenizer, text):
    """Text -> ids, with no bos added (Llama's tokenizer would add one by itself)."""
    return tokenizer.encode(text, add_special_tokens=False).ids


class Chat:
    """Messages to ids and back, in the Llama 3.1 format or in ChatML (Qwen2.5, SmolLM2), whichever the tokenizer knows.

    Texts are encoded as characters and special tokens are put between them by number, so that no text can open or close
    a turn. messages: [{"role": "system" | "user" | "assistant", "content": str}, …].
    """

    DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

    def __init__(self, tokenizer, template="", stops=()):
        """template: the folder's chat template, searched for facts (default system message, date block), never run."""
        self.tokenizer, special = tokenizer, tokenizer.token_to_id
        self.llama = special("<|start_header_id|>") is not None
        if self.llama:
            self.bos, self.end = special("<|begin_of_text|>"), special("<|eot_id|>")
            # <|eom_id|> is Llama 3.1's name for what the tokenizer of Llama 3 still calls reserved_special_token_4
            others = "<|end_of_text|>", "<|eom_id|>", "<|reserved_special_token_4|>"
        else:
            self.bos, self.end, others = None, special("<|im_end|>"), ("<|endoftext|>",)
        if self.end is None or self.llama and self.bos is None or not self.llama and special("<|im_start|>") is None:
            raise UserError("the tokenizer has neither Llama 3's chat tokens (<|start_header_id|>, <|eot_id|>, "
                            "<|begin_of_text|>) nor ChatML's (<|im_start|>, <|im_end|>): take an instruct model's")
        self.stops = {self.end, *stops} | {special(name) for name in others} - {None}
        self.dates = self.llama and "Cutting Knowledge Date" in template
        default = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}]*?)<\|im_end\|>", template)
        self.default_system = default.group(1) if default else None

    @classmethod
    def from_dir(cls, path):
        """Needs the tokenizer's files only; eos ids of config.json and generation_config.json are stops too."""
        path = Path(path)
        settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
        template = settings.get("chat_template") or ""
        if isinstance(template, list):  # several templates by name
            template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"),
                            "")
        if (path / "chat_template.jinja").exists():
            try:
                template = (path / "chat_template.jinja").read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path / 'chat_template.jinja'}: not readable as text ({error})") from None
        if not isinstance(template, str):
            raise UserError(f"{path / 'tokenizer_config.json'}: chat_template is {shorten(template)}, expected text")
        files = [path / name for name in ("config.json", "generation_config.json") if (path / name).exists()]
        stops = set().union(*map(end_ids, files))
        try:
            return cls(load_tokenizer(path), template, stops)
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    def turn(self, role, text=""):
        """A message as ids, without its end; without a text, what comes before one."""
        special = self.tokenizer.token_to_id
        if self.llama:
            return [special("<|start_header_id|>"), *encode(self.tokenizer, role), special("<|end_header_id|>"),
                    *encode(self.tokenizer, "\n\n" + text)]
        # ROLE\nTEXT is one piece: cut at the newline, a text that starts with white space would get other ids
        return [special("<|im_start|>"), *encode(self.tokenizer, f"{role}\n{text}")]

    def prompt(self, messages):
        """messages -> ids up to the point where the assistant's reply begins."""
        messages = [(m["role"], m["content"].strip() if self.llama else m["content"]) for m in messages]
        if self.dates:  # the published 3.1 template always opens with a system message that starts with two dates
            system = messages.pop(0)[1] if messages and messages[0][0] == "system" else ""
            messages.insert(0, ("system", self.DATES + system))
        elif self.default_system is not None and (not messages or messages[0][0] != "system"):
            messages.insert(0, ("system", self.default_system))
        ids, between = ([self.bos], []) if self.llama else ([], encode(self.tokenizer, "\n"))
        for role, text in messages:
            ids += [*self.turn(role, text), self.end, *between]
        return ids + self.turn("assistant")

    def example(self, messages, response):
        """-> (ids, supervised): prompt and response as one row; supervised[i] is True where id i is the assistant's,
        the end of its turn included. The response is stripped and encoded apart, as it will be when generated."""
        prompt, reply = self.prompt(messages), [*encode(self.tokenizer, response.strip()), self.end]
        return prompt + reply, [False] * len(prompt) + [True] * len(reply)

    def text(self, ids):
        """ids -> text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
