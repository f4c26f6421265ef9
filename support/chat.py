"""Tokenizers and chat formats: from messages to ids and back.

A model folder's own chat template, a Jinja text, says how a conversation is written. It is rendered as transformers
renders it, so that ids equal those of `apply_chat_template`, with these exceptions. Control tokens that a user types
stay ordinary text. Templates that ask for today's date, as Llama 3.2's does, get 26 July 2024, so that a run can be
repeated. No `tools` and `documents` are passed, not even None: some templates fail with None. And a response is encoded
apart from its prompt.
"""
import datetime
import json
import re
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, normalizers

from support.files import UserError, read_json, shorten

# For folders without a template
LLAMA_TEMPLATE = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TODAY = datetime.date(2024, 7, 26)  # the date that Llama 3.1's template has where none is given


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
    if tokenizer.normalizer is None and str(tokenizer_settings(path).get("tokenizer_class")).startswith("Qwen2"):
        tokenizer.normalizer = normalizers.NFC()  # transformers' class for Qwen does so, whatever tokenizer.json says
    tokenizer.encode_special_tokens = True  # "<|eot_id|>" in a text is ten characters, not the end of a turn
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_settings(path):
    """tokenizer_config.json of a model folder; empty if there is none."""
    file = Path(path) / "tokenizer_config.json"
    return read_json(file) if file.exists() else {}


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


# ----------------------------------------------------------------------------------------------------------------------
# The template

class Generation(Extension):
    """The block {% generation %}, with which some templates mark replies. It changes nothing in what is written."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def refuse(message):
    """raise_exception, with which a template refuses a conversation."""
    raise TemplateError(message)


def compile_template(text):
    """A chat template as transformers compiles it: its environment, filter and functions."""
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    jinja.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options)
    jinja.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    return jinja.from_string(text)


def read_template(path):
    """The chat template of a model folder, or None. chat_template.jinja wins over tokenizer_config.json, where it may
    also be the one named "default" in a list."""
    file = Path(path) / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not readable as text ({error})") from None
    template = tokenizer_settings(path).get("chat_template")
    if isinstance(template, list):
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"),
                        template)
    if not isinstance(template, str | None):
        raise UserError(f"{Path(path) / 'tokenizer_config.json'}: chat_template is {shorten(template)}, expected text, "
                        'or a list in which one is named "default"')
    return template


class Chat:
    """Messages to ids and back, in a model folder's chat format.

    messages: [{"role": "system" | "user" | "assistant", "content": str}, …].

    Control tokens are the tokenizer's special tokens, and other added tokens with which the template opens or closes
    turns. No text in a message produces one, unless the template itself takes something out of the text.
    `is_protected` is False where the template writes some turns as ordinary text, which a message can imitate.

    end: the id that ends a reply, None where the template does not show it. stops: the set of ids at which a reply
    ends. bos: the id that begins every conversation, or None.
    """

    def __init__(self, path):
        """Only tokenizer.json is needed. If there are tokenizer_config.json, config.json and generation_config.json,
        their eos tokens are stops, too. UserError if a file is broken, if the template does not work, and if there is
        no template and the tokenizer has neither Llama 3's nor ChatML's control tokens."""
        self.path, self.tokenizer = path, load_tokenizer(path)
        template, settings = read_template(path) or self.plain_template(), tokenizer_settings(path)
        # Tokens may be written as text, or as {"content": text, …}
        names = {key: value.get("content") if isinstance(value, dict) else value
                 for key, value in settings.items() if key.endswith("_token")}
        self.variables = {key: value for key, value in names.items() if isinstance(value, str)}
        try:
            self.template = compile_template(template)
        except Exception as error:  # jinja2 makes Python of it, which raises what it likes
            raise UserError(f"{path}: the chat template is no Jinja template ({shorten(str(error), 200)})") from None
        self.read_format()

        stops = {self.end, self.tokenizer.token_to_id(self.variables.get("eos_token", ""))} - {None}
        files = [Path(path) / name for name in ("config.json", "generation_config.json")]
        self.stops = stops.union(*(eos_ids(file) for file in files if file.exists()))

    @classmethod
    def from_dir(cls, path):
        """The same as Chat(path), under the name that other loaders have."""
        return cls(path)

    def plain_template(self):
        """Llama 3's format or ChatML, whichever the tokenizer has the control tokens for."""
        for template in (LLAMA_TEMPLATE, CHATML_TEMPLATE):
            if all(self.tokenizer.token_to_id(token) is not None for token in re.findall(r"<\|\w+\|>", template)):
                return template
        raise UserError(f"{self.path}: there is no chat template, and the tokenizer has neither Llama 3's chat tokens "
                        "(<|start_header_id|>, <|eot_id|>, <|begin_of_text|>) nor ChatML's (<|im_start|>, <|im_end|>): "
                        "take an instruct model's")

    def read_format(self):
        """Render a conversation of plain words, and read from it the control tokens, bos, end and `is_protected`."""
        added = {token.content: token for token in self.tokenizer.get_added_tokens_decoder().values()}
        self.control = {text: token for text, token in added.items() if token.special}
        words = {"user": "Aardvark", "assistant": "Bandicoot", "system": "Caribou"}
        system, user, reply = ({"role": role, "content": words[role]} for role in ("system", "user", "assistant"))
        text = self.render([user, reply, user], add_generation_prompt=True)
        # "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", …
        gaps = re.split("|".join(words.values()), text)
        if len(gaps) != 4:
            raise UserError(f"{self.path}: the chat template does not write each message exactly once. Give another "
                            "chat_template.jinja")
        try:
            scaffold = gaps + re.split("|".join(words.values()), self.render([system, user]))
        except UserError:  # some templates have no system role
            scaffold = gaps
        # Some checkpoints do not call the tokens of their turns special. The library would go on recognising them in a
        # user's text. White space, words and <think> may be added tokens, too, but open no turn; templates look for
        # <think> in a message.
        written = {text: token for text, token in added.items()
                   if not token.special and re.search(r"[^\w\s]", text) and not re.fullmatch(r"</?think\w*>", text)
                   and any(text in part for part in scaffold)}
        self.tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in written])
        self.control |= written
        longest_first = sorted(self.control, key=len, reverse=True)
        any_token = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) matches nothing
        self.pattern, self.begins = re.compile(f"({any_token})"), re.compile(f"(?={any_token}).", re.S)
        self.is_protected = all(self.pattern.search(gap) for gap in gaps[1:])
        ids = self.encode_rendered(text)
        self.bos = ids[0] if self.pattern.match(text) and ids.count(ids[0]) == 1 else None
        try:
            self.end = self.example([user], reply["content"])[0][-1]
        except UserError:
            self.end = None

    def render(self, messages, add_generation_prompt=False):
        """The conversation as the template writes it. UserError if the template refuses it or fails."""
        try:
            text = self.template.render(self.variables, messages=messages, add_generation_prompt=add_generation_prompt)
            text.encode()  # fails for half of a character, which tokenizers do not take
            return text
        except Exception as error:  # a template can raise anything: it is a program
            raise UserError(f"{self.path}: the chat template does not take this conversation "
                            f"({shorten(str(error), 200)})") from None

    def protect(self, messages):
        """Returns (messages, mark): wherever a control token begins in what someone typed, one private-use character
        comes after its first character. `encode_rendered` removes it. The template sees everything else as it is."""
        texts = "".join(m["content"] for m in messages)
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in texts)
        return [{**m, "content": self.begins.sub(lambda first: first[0] + mark, m["content"])} for m in messages], mark

    def encode_rendered(self, text, mark=""):
        """What the template has written -> ids. Control tokens become their ids, each text between them is encoded in
        one piece, and marks are left out."""
        ids, pieces = [], self.pattern.split(text)  # text, token, text, token, …, text
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self.tokenizer.token_to_id(piece))
                continue
            if i > 0 and self.control[pieces[i - 1]].rstrip:  # the token takes the white space after it
                piece = piece.lstrip()
            if i + 1 < len(pieces) and self.control[pieces[i + 1]].lstrip:
                piece = piece.rstrip()
            ids += encode(self.tokenizer, piece.replace(mark, ""))
        return ids

    def prompt(self, messages):
        """The ids of a conversation, up to where the assistant's next reply begins."""
        messages, mark = self.protect(messages)
        return self.encode_rendered(self.render(messages, add_generation_prompt=True), mark)

    def example(self, messages, response):
        """A training example, (ids, supervised): the prompt, then the response and the token that ends its turn.

        supervised[i] is True where id i does not belong to the prompt: for the response, its end token, and what the
        template puts before it (Qwen3's: an empty thought). The response is stripped, and encoded separately from the
        prompt, because a generated reply begins there, too. UserError for a template that writes a past reply in
        another way than a new one, or that shows no end of a reply.
        """
        messages, mark = self.protect([*messages, {"role": "assistant", "content": response.strip()}])
        prompt, response = self.render(messages[:-1], add_generation_prompt=True), messages[-1]["content"]
        for following in ([], [{"role": "user", "content": "And?"}]):  # some templates end a turn only before another
            whole = self.render(messages + following)
            if not whole.startswith(prompt):
                raise UserError(f"{self.path}: cannot train with this chat template: its prompt for a reply ends in "
                                f"{shorten(prompt[-30:])}, which it does not write before a past reply. Give the "
                                "folder another chat_template.jinja")
            reply = whole[len(prompt):]
            ends = [token.end() for token in self.pattern.finditer(reply)]
            start = self.pattern.sub(lambda token: "\0" * len(token[0]), reply).find(response)
            if response and start >= 0:
                ends = [end for end in ends if end > start + len(response)][:1]
            elif following:  # an empty response, or one that the template has changed, cannot be told from what follows
                ends = []
            if ends:
                prompt, reply = self.encode_rendered(prompt, mark), self.encode_rendered(reply[:ends[-1]], mark)
                return prompt + reply, [False] * len(prompt) + [True] * len(reply)
        raise UserError(f"{self.path}: cannot train with this chat template: no special token ends a reply. Give the "
                        "folder another chat_template.jinja")

    def text(self, ids):
        """The text of some ids, stripped and without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
