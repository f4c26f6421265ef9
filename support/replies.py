"""Reading what language models write: JSON that is almost JSON, plain text, poles and traits; nothing that could be read in two ways.
"""
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from lora import TRAITS


CHOICES = {"high": 1, "low": -1, "neither": 0}
LONGEST = 50_000  # characters of a reply; what is longer is no answer


class Unusable(ValueError):
    """A reply that cannot be used. The message is the complaint that goes back to the teacher."""


@dataclass
class Reply:
    text: str
    cut: bool = False  # ended by the limit on tokens and not by the teacher
    read: int = 0      # tokens of the prompt
    written: int = 0   # tokens of the reply


class Fault(Exception):
    """A request that failed and may succeed when it is made again. `wait`: seconds that the server asks for."""

    def __init__(self, message, wait=None):
        super().__init__(message)
        self.wait = wait


# A mark, a text in double or in single quotes, or a bare word. A quote ends a text only where the object goes on after
# it, so that 'it's fine' is one text. Possessive (*+): nothing is tried twice, however long a text is.
TOKEN = re.compile(r"""\s*+(?: ([{}\[\]:,])
                             | "((?: [^"\\] | \\. | "(?!\s*+[,:}\]]) )*+)"
                             | '((?: [^'\\] | \\. | '(?!\s*+[,:}\]]) )*+)'
                             | ([^\s{}\[\]:,"']++) )""", re.S | re.X)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


def unescape(text):
    text = re.sub(r"(?s)\\(?:u([0-9a-fA-F]{4})|(.))",
                  lambda m: chr(int(m[1], 16)) if m[1] else ESCAPES.get(m[2], m[2]), text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # \ud83d\ude00 is one character


def read_value(text, at, depth=0):
    """The JSON value that begins at text[at] -> (value, where it ends), also in single quotes, with bare words or with
    a comma too many. Keys are lower case; bare words and numbers stay texts, but null is None."""
    def token(at):
        found = TOKEN.match(text, at)
        if not found:
            raise Unusable("its JSON is not complete")
        return found[found.lastindex], found.lastindex, found.end()  # kinds: 1 a mark, 2 and 3 quoted, 4 bare

    word, kind, at = token(at)
    if kind != 1:
        return (unescape(word) if kind < 4 else None if word in ("null", "None") else word), at
    if depth > 8:
        raise Unusable("its JSON is nested too deeply")
    if word not in "{[":
        raise Unusable(f"its JSON has {word!r} where a value should be")
    found, close, values = {}, "]}"[word == "{"], []
    while True:
        word, kind, end = token(at)
        if kind == 1 and word == close:
            return (found if close == "}" else values), end
        value, at = read_value(text, at, depth + 1)
        if close == "}":
            key, (word, kind, at) = str(value).strip().lower(), token(at)
            if (word, kind) != (":", 1):
                raise Unusable(f"its JSON has {word!r} after the key {key!r}, expected a colon")
            value, at = read_value(text, at, depth + 1)
            if found.setdefault(key, value) != value:
                raise Unusable(f"{key!r} stands in it twice, with different values")
        values.append(value)
        word, kind, end = token(at)
        if (word, kind) == (",", 1):
            at = end
        elif (word, kind) != (close, 1):
            raise Unusable(f"its JSON has {word!r} where a comma or {close!r} should be")


def read_object(reply, wanted):
    """The one JSON object in a reply, whatever stands around it, that has one of the keys `wanted`."""
    text, found, complaint, failures = reply.text, [], "there is no JSON object in it", 0
    at = text.find("{")
    while at >= 0 and failures < 50:  # each may read to the end
        try:
            value, end = read_value(text, at)
            if wanted & value.keys() and value not in found:
                found.append(value)
        except Unusable as problem:
            end, failures = at + 1, failures + 1
            complaint = str(problem) if failures == 1 else complaint
        at = text.find("{", end)
    if len(found) > 1:
        raise Unusable("there are several JSON objects in it that differ")
    if not found:
        raise Unusable("it was cut off; be briefer" if reply.cut else complaint)
    return found[0]


def read_text(reply, key):
    """A reply in plain words, or what stands under `key` where a teacher has put it into JSON all the same."""
    text = re.sub(r"^```\w*\n(.*)\n```$", r"\1", reply.text.strip(), flags=re.S).strip()
    if text.startswith("{") and key in text.lower():
        text = read_object(reply, {key})[key]
    elif reply.cut:
        raise Unusable("it was cut off; be briefer")
    if not isinstance(text, str):
        raise Unusable(f"{key} is {str(text)[:80]!r}, expected a text")
    text = re.sub(rf"^\W*{key}\W*:[*_\s]*", "", text.strip(), flags=re.I)
    text = re.sub(r'^["“]([^"“”]*)["”]$', r"\1", text).strip()
    if not text:
        raise Unusable("it is empty")
    return text


def read_pole(value):
    """1, −1 or 0 for what teachers and annotators write for high, low and neither; None for anything else."""
    text = "none" if value is None else str(value).strip().lower().replace("−", "-")
    text = re.sub(r"( pole|\.0+)$", "", text)
    return {"+1": 1, "1": 1, "+": 1, "-1": -1, "-": -1, "0": 0, "none": 0, "neutral": 0, **CHOICES}.get(text)


def read_traits(found):
    """{trait: pole or {"pole", "cue"}}, or a list of objects with "trait" -> ({trait: ±1}, {trait: {"pole", "cue"}}),
    the active ones. Unusable for unknown traits, other poles, and if none is active."""
    if isinstance(found, list) and all(isinstance(one, dict) and isinstance(one.get("trait"), str) for one in found):
        if len({one["trait"] for one in found}) < len(found):
            raise Unusable("a trait stands in it twice")
        found = {one["trait"].strip().lower(): one for one in found}
    if not isinstance(found, dict):
        raise Unusable(f"traits is {str(found)[:80]!r}, expected an object with the traits")
    traits, why = {}, {}
    for trait, value in found.items():
        if trait not in TRAITS:
            raise Unusable(f"{trait[:40]!r} is not one of the traits {', '.join(TRAITS)}")
        cue = value.get("cue") if isinstance(value, dict) else None
        poles = {read_pole(value[key]) for key in ("pole", "value") if key in value} if isinstance(value, dict) \
            else {read_pole(value)}
        if len(poles) != 1 or None in poles:
            raise Unusable(f"{trait} is {str(value)[:80]!r}, expected the pole high, low or neither")
        pole = poles.pop()
        if pole:
            traits[trait] = pole
            why[trait] = {"pole": "high" if pole > 0 else "low", "cue": cue.strip() if isinstance(cue, str) else ""}
    if not traits:
        raise Unusable("all-zero vector: no trait has a pole; name at least the one that is called for most")
    return dict(sorted(traits.items(), key=lambda t: TRAITS.index(t[0]))), why


def scripts(text):
    """The scripts of a text's letters, the most frequent first. Japanese mixes three, so these count as one."""
    names = (unicodedata.name(char, "?").split()[0] for char in text if char.isalpha())
    return [name for name, _ in Counter("CJK" if n in ("HIRAGANA", "KATAKANA") else n for n in names).most_common()]


def check_language(response, item):
    """Unusable for a response in a script of which the query has no letter: small models fall into another language.
    (French for an English query goes unseen.)"""
    ours, theirs = scripts(response), scripts(item["query"])
    if ours and theirs and ours[0] not in theirs:
        raise Unusable(f"the response is in the wrong language: its script is {ours[0].title()}, the query's "
                       f"{theirs[0].title()}")
