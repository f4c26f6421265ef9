"""Reading what language models write: thoughts, plain text, poles, traits, and JSON that is almost valid.

Small models put JSON in single quotes, forget quotes around keys or leave a comma too many. Such a reply is read,
because asking again costs more. A reply that could be read in two ways is not guessed at: it is an UnusableReply, whose
message goes back to the teacher.
"""
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from lora import TRAITS


CHOICES = {"high": 1, "low": -1, "neither": 0}
LONGEST = 50_000  # characters of a reply that are read; no answer is this long


class UnusableReply(ValueError):
    """A reply that cannot be used. The message is the complaint that goes back to the teacher."""


class RequestFailed(Exception):
    """A request got no reply, but may succeed later. wait: the seconds to wait that the server named, or None.
    busy: the server takes fewer requests than it is sent."""

    def __init__(self, message, wait=None, busy=False):
        super().__init__(message)
        self.wait, self.busy = wait, busy


class QueryRejected(Exception):
    """A query becomes no record. The message is the reason, such as the complaint about the last reply."""


# What models and servers leave in a text: marks of thoughts and of turns, of all families
TAG = r"(?i:(?:\w{1,20}[:_])?(?:think|thinking|thoughts?|reasoning))"  # <think>, <seed:think>
CHANNEL = r"(?:<\|start\|>assistant\s*)?<\|channel\|>\s*"  # Harmony, the format of gpt-oss
MARK = re.compile(rf"""
    (?P<thought>
        {CHANNEL}(?:analysis|commentary) | <{TAG}> | \[THINK\] | ◁think▷ | <\|START_THINKING\|> | <\|channel>\s*thought)
  | (?P<reply>
        {CHANNEL}final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|> | <\|start\|>assistant\s*<\|message\|>
      | assistantfinal  # what is left of Harmony's header where a server drops its tokens
      | </{TAG}> | \[/THINK\] | ◁/think▷ | <\|END_THINKING\|> | <channel\|> | <answer>)
  | (?P<begin>  # of a text, a box or the assistant's turn
        <s> | <bos> | \[/INST\] | <[|｜](?:startof|(?:begin|start)[_▁]of[_▁])(?:text|sentence|box)[|｜]>
      | <\|START_RESPONSE\|> | <\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>
      | (?:<\|?(?:im_start|start_header_id|header_start|start_of_role|start_of_turn|turn)\|?>\s*(?:assistant|model)\b
          | <[|｜](?:im_)?[Aa]ssistant[|｜]>(?:assistant(?=<))?)
        (?:<\|(?:end_header_id|header_end|end_of_role|im_sep|im_middle)\|>)?)
  | (?P<harmony>  # between the parts of a turn in Harmony, and at its end
        <\|(?:message|end|start|channel|constrain)\|>)
  | (?P<end>
        </s> | <eos> | <(?:end|start)_of_turn> | <turn\|> | <\|turn> | \[INST\] | </answer>
      | <[|｜][^\s<>|｜]{{1,40}}[|｜]>)""", re.X)  # <|im_end|>, <|eot_id|>, <|user|> and the like


@dataclass
class Reply:
    """What a teacher wrote. raw is all of it; text is what stands after the last thought and the turn's header, and
    before the first end of a turn. A thought without an end was cut off, and leaves no text."""
    raw: str
    cut_off: bool = False    # given: the limit on tokens ended it. Kept: no end of a turn came, or none of a thought
    tokens_read: int = 0     # length of the prompt
    tokens_written: int = 0

    def __post_init__(self):
        start, end, thinking = 0, len(self.raw), False
        for mark in MARK.finditer(self.raw):
            kind = mark.lastgroup
            if kind == "harmony" and thinking:  # parts of the thought: only the next header begins the reply
                continue
            written = thinking or self.raw[start:mark.start()].strip()
            if kind in ("harmony", "end") or kind == "begin" and written:  # the turn ends, or another begins
                end = mark.start()
                self.cut_off = False
                break
            start = mark.end()
            thinking = kind == "thought"
        self.text = "" if thinking else self.raw[start:end]
        self.cut_off = self.cut_off or thinking


# ----------------------------------------------------------------------------------------------------------------------
# JSON

# One token: punctuation, a string in double quotes, a string in single quotes, or a bare word. A quote ends a string
# only if punctuation comes next, so 'it's fine' is one string. Nothing here backtracks, so a long string takes linear
# time. Groups are atomic, (?>(?:…)*), not possessive, a + after the *: Python before 3.11.5 matches those wrongly.
TOKEN = re.compile(r"""\s*+(?: ([{}\[\]:,])
                             | "((?>(?: [^"\\] | \\. | "(?!\s*+[,:}\]]) )*))"
                             | '((?>(?: [^'\\] | \\. | '(?!\s*+[,:}\]]) )*))'
                             | ([^\s{}\[\]:,"']++) )""", re.S | re.X)
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.S)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


def unescape(text):
    text = ESCAPE.sub(lambda m: chr(int(m[1], 16)) if m[1] else ESCAPES.get(m[2], m[2]), text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # \ud83d\ude00 is one character


def unique_keys(pairs):
    found = {}
    for key, value in pairs:
        key = key.strip().lower()
        if found.setdefault(key, value) != value:
            raise UnusableReply(f"{key!r} is in it twice, with different values")
    return found


def read_json_object(text, start):
    """Read the JSON object that begins at text[start]. Returns it and the position after its end.

    The tokens are rewritten as strict JSON, which json.loads then reads. Keys become lower case. Bare words and numbers
    become strings, except null and None, which become None.
    """
    strict, depth, at = [], 0, start
    while True:
        token = TOKEN.match(text, at)
        if not token:
            raise UnusableReply("its JSON is not complete")
        punctuation, double, single, bare = token.groups()
        at = token.end()
        if punctuation is None:
            if bare in ("null", "None"):
                strict.append("null")
            elif bare and bare[0] in "“”„‘’":
                raise UnusableReply('its JSON has curly quotes like “ and ”, expected straight ones like "')
            elif bare is not None:
                strict.append(json.dumps(bare))
            else:
                strict.append(json.dumps(unescape(single if double is None else double)))
            continue
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(punctuation, 0)
        if depth > 8:
            raise UnusableReply("its JSON is nested too deeply")
        if punctuation in "}]" and strict[-1] == ",":
            strict.pop()
        strict.append(punctuation)
        if depth == 0:
            break
    try:
        return json.loads("".join(strict), object_pairs_hook=unique_keys), at
    except json.JSONDecodeError as error:
        raise UnusableReply(f"its JSON is not valid ({error.msg})") from None


def read_object(reply, wanted):
    """Returns the one JSON object in a reply that has one of the keys `wanted`. There may be other text around it."""
    found, complaints, start = [], [], reply.text.find("{")
    while start >= 0 and len(complaints) < 50:  # a failed attempt may read to the end, so their number is limited
        try:
            value, end = read_json_object(reply.text, start)
            if wanted & value.keys() and value not in found:
                found.append(value)
        except UnusableReply as problem:
            complaints.append(str(problem))
            end = start + 1
        start = reply.text.find("{", end)
    if len(found) > 1:
        raise UnusableReply("there are several JSON objects in it that differ")
    if not found:
        if reply.cut_off:
            raise UnusableReply("it was cut off; be briefer")
        expected = " or ".join(sorted(wanted))
        raise UnusableReply(complaints[0] if complaints else f"there is no JSON object in it with the key {expected}")
    return found[0]


# ----------------------------------------------------------------------------------------------------------------------
# Plain text, poles, traits

def check_text(value, key):
    """Returns a string without white space around it. UnusableReply if it is empty or no string."""
    if not isinstance(value, str):
        raise UnusableReply(f"{key} is {str(value)[:80]!r}, expected a string")
    if not value.strip():
        raise UnusableReply(f"{key} is empty, expected some text")
    return value.strip()


# A text in one fence, perhaps with its language
FENCED = re.compile(r"```(?:\w*[^\S\n]*\n|(?i:text|txt|plain|plaintext|markdown|md|json)\s)?((?>(?:(?!```).)*))```", re.S)
# An object from its first key on. It ends with its last brace or, if it was cut off, has none
OBJECT = re.compile(r"""\W*\{\s*["'“„‘]?\w[^{}:]*+: (?: [^}]*+ | .*\}[^\w}]*+ )""", re.S | re.X)


def is_json(text, key):
    """Returns whether a text is meant as JSON: an object in it has the key, or it is all object, or one in a fence is.
    Other braces belong to a plain text."""
    braces = text[text.find("{"):] if "{" in text else ""
    keyed = re.search(rf"""(?:\{{|["'“„‘])\s*{key}\s*["'“”’]?\s*:""", braces, re.I)
    return bool(keyed) or any(OBJECT.fullmatch(part) for part in re.split(r"```\w*", text))


def read_text(reply, key):
    """Returns a reply that is plain text. If it is meant as JSON, returns its object's value of `key`.

    UnusableReply if it is empty or cut off, or if it is JSON without this key.
    """
    text = reply.text.strip()
    fenced = FENCED.fullmatch(text)
    text = fenced[1].strip() if fenced else text
    if is_json(text, key):
        text = check_text(read_object(reply, {key})[key], key)
    elif reply.cut_off:
        raise UnusableReply("it was cut off; be briefer")
    text = re.sub(rf"^\W*{key}\W*:[*_\s]*", "", text, flags=re.I)  # **Response:**
    return check_text(re.sub(r'^["“]([^"“”]*)["”]$', r"\1", text), key)


def read_pole(value):
    """Returns 1, −1 or 0 for the ways in which teachers and annotators write high, low and neither.

    Returns None for anything else.
    """
    text = "none" if value is None else str(value).strip().lower().replace("−", "-")
    text = re.sub(r"( pole|\.0+)$", "", text)
    return {"+1": 1, "1": 1, "+": 1, "-1": -1, "-": -1, "0": 0, "none": 0, "neutral": 0, **CHOICES}.get(text)


def read_traits(found):
    """Read {trait: pole or {"pole", "cue"}}, or a list of objects with "trait".

    Returns ({trait: ±1}, {trait: {"pole", "cue"}}) of the active traits: a record's `traits`, and the reasoning about
    them. UnusableReply for an unknown trait or another pole, and if no trait is active.
    """
    if isinstance(found, list) and all(isinstance(one, dict) and isinstance(one.get("trait"), str) for one in found):
        found = unique_keys((one["trait"], one) for one in found)
    if not isinstance(found, dict):
        raise UnusableReply(f"traits is {str(found)[:80]!r}, expected an object with the traits")
    traits, reasoning = {}, {}
    for trait, value in found.items():
        if trait not in TRAITS:
            raise UnusableReply(f"{trait[:40]!r} is not one of the traits {', '.join(TRAITS)}")
        entry = value if isinstance(value, dict) else {"pole": value}
        poles = {read_pole(entry[key]) for key in ("pole", "value") if key in entry}
        if len(poles) != 1 or None in poles:
            raise UnusableReply(f"{trait} is {str(value)[:80]!r}, expected the pole high, low or neither")
        pole, cue = poles.pop(), entry.get("cue")
        if pole:
            cue = cue.strip() if isinstance(cue, str) else ""
            traits[trait] = pole
            reasoning[trait] = {"pole": "high" if pole > 0 else "low", "cue": cue}
    if not traits:
        raise UnusableReply("all-zero vector: no trait has a pole; name at least the one that is called for most")
    return {trait: traits[trait] for trait in TRAITS if trait in traits}, reasoning


# ----------------------------------------------------------------------------------------------------------------------
# The language of a response

def scripts(text):
    """Returns the scripts of a text's letters, the most frequent first. Japanese mixes three, which count as one.

    NFKC makes ordinary letters of mathematical, fullwidth and halfwidth ones.
    """
    names = (unicodedata.name(char, "?") for char in unicodedata.normalize("NFKC", text) if char.isalpha())
    return [name for name, _ in Counter("CJK" if name.startswith(("HIRAGANA", "KATAKANA", "IDEOGRAPHIC"))
                                        else name.split()[0] for name in names).most_common()]


def check_language(response, item):
    """UnusableReply if a query has no letter of the script that most of the response is written in.

    The texts of its history count, too. Small models fall into another language. This notices Chinese for an
    English query, but not French.
    """
    texts = [item["query"], *(turn["content"] for turn in item.get("history") or ())]
    ours, theirs = scripts(response), scripts("\n".join(texts))
    if ours and theirs and ours[0] not in theirs:
        raise UnusableReply(f"the response is in the wrong language: its script is {ours[0].title()}, the "
                            f"conversation's {theirs[0].title()}")
