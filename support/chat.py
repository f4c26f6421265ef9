"""Tokenizers and chat formats: from messages to ids and back.

Chat knows two formats, Llama 3.1's and ChatML (Qwen2.5, SmolLM2). It recognises them by the tokenizer's special tokens.
Ids equal those of `apply_chat_template` of transformers, with two exceptions: special tokens that a user types stay
ordinary text, and the date is always Llama 3.1's, also where Llama 3.2's template has today's.
"""
import re
from pathlib import Path

from tokenizers import Tokenizer

from support.files import UserError, read_json, shorten


def load_tokenizer(path):
    """Load tokenizer.json of a model folder, set so that special tokens in a user's text stay ordinary text.
    UserError if it is missing or broken, or belongs to another model."""
    file = Path(path) / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{file}: no such file; download the tokenizer's files beside the weights")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises Exception itself, or for a Rust panic only BaseException
        raise UserError(f"{file}: not a tokenizer ({shorten(str(error), 300)})") from None
    check_vocabulary(tokenizer, file)
    tokenizer.encode_special_tokens = True  # "<|eot_id|>" in a text is ten characters, not the end of a turn
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_vocabulary(tokenizer, file):
    """UserError if there is a config.json beside the tokenizer, and it describes a model with another vocabulary."""
    config = file.with_name("config.json")
    size = read_json(config).get("vocab_size") if config.exists() else None
    if type(size) is not int:
        return
    token, largest = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1], default=("", -1))
    if largest >= size:
        raise UserError(f"{file}: {token!r} has the id {largest}, but vocab_size in config.json is {size}: is this "
                        "another model's tokenizer?")
    special = tokenizer.get_added_tokens_decoder()
    for eos in eos_ids(config):
        if eos not in special:
            raise UserError(f"{file}: {eos}, eos_token_id of config.json, is {tokenizer.id_to_token(eos)!r} here and "
                            "no special token: is this another model's tokenizer?")


def eos_ids(file):
    """eos_token_id of a JSON file, which may be absent, a number or a list, as a set of ids."""
    eos = read_json(file).get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(e) is int and 0 <= e < 2**31 for e in eos):
        raise UserError(f"{file}: eos_token_id is {shorten(eos)}, expected a number or a list of numbers")
    return set(eos)


def encode(tokenizer, text):
    """Text -> ids, without the bos that Llama's tokenizer would add to every text."""
    return tokenizer.encode(text, add_special_tokens=False).ids


class Chat:
    """Messages to ids and back, in Llama 3.1's format or in ChatML, depending on the tokenizer's special tokens.

    messages: [{"role": "system" | "user" | "assistant", "content": str}, …]. Their texts are encoded as ordinary
    characters, and special tokens are inserted by id, so that no text can open or close a turn.

    stops: the set of ids that end a reply. end: the id that ends a turn. bos: the first id of a conversation, or None.
    """

    DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

    def __init__(self, tokenizer, template="", stops=()):
        """template: the folder's chat template. It is never run, only searched for a default system message and for
        Llama 3.1's dates. stops: further ids that end a reply. UserError if the tokenizer has no chat tokens."""
        self.tokenizer, special = tokenizer, tokenizer.token_to_id
        self.llama = special("<|start_header_id|>") is not None
        if self.llama:
            self.bos, self.end = special("<|begin_of_text|>"), special("<|eot_id|>")
            # <|eom_id|> is Llama 3.1's name of the token that Llama 3 calls <|reserved_special_token_4|>
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
        """The chat format of a model folder. Only the tokenizer's files are needed; if there are config.json and
        generation_config.json, their eos ids are stops, too."""
        path = Path(path)
        settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
        template = settings.get("chat_template") or ""
        if isinstance(template, list):  # several templates with names
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
        stops = set().union(*map(eos_ids, files))
        try:
            return cls(load_tokenizer(path), template, stops)
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    def turn(self, role, text=""):
        """The ids of one message without the token that ends it; with no text, the opening of a message."""
        special = self.tokenizer.token_to_id
        if self.llama:
            return [special("<|start_header_id|>"), *encode(self.tokenizer, role), special("<|end_header_id|>"),
                    *encode(self.tokenizer, "\n\n" + text)]
        # encoded as one piece: split at the newline, a text that starts with white space would get other ids
        return [special("<|im_start|>"), *encode(self.tokenizer, f"{role}\n{text}")]

    def prompt(self, messages):
        """The ids of a conversation, up to where the assistant's next reply begins."""
        messages = [(m["role"], m["content"].strip() if self.llama else m["content"]) for m in messages]
        if self.dates:  # Llama 3.1's published template always opens with a system message that begins with two dates
            system = messages.pop(0)[1] if messages and messages[0][0] == "system" else ""
            messages.insert(0, ("system", self.DATES + system))
        elif self.default_system is not None and (not messages or messages[0][0] != "system"):
            messages.insert(0, ("system", self.default_system))
        ids, between = ([self.bos], []) if self.llama else ([], encode(self.tokenizer, "\n"))
        for role, text in messages:
            ids += [*self.turn(role, text), self.end, *between]
        return ids + self.turn("assistant")

    def example(self, messages, response):
        """A training example, (ids, supervised): the prompt, then the response and the token that ends its turn.

        supervised[i] is True where id i belongs to the response or is its end token. The response is stripped, and
        encoded separately from the prompt, because a generated reply begins there, too.
        """
        prompt, reply = self.prompt(messages), [*encode(self.tokenizer, response.strip()), self.end]
        return prompt + reply, [False] * len(prompt) + [True] * len(reply)

    def text(self, ids):
        """The text of some ids, stripped and without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
