"""Laws of the data in real language, data/*.jsonl. data/README.md says how they were written."""
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from lora import EXPERTS, TRAITS
from router import active_experts
from support.records import load_data, normalise_query, read_records

DATA = Path(__file__).resolve().parent.parent / "data"
NAMES_A_TRAIT = re.compile(
    r"(?i)\b(openness|conscientious\w*|extr[ao]ver[st]\w*|introver[st]\w*|agreeable\w*|neurotic\w*)\b")


@pytest.fixture(scope="module")
def records():
    return read_records(DATA / "personacot.jsonl")


def test_every_pole_that_a_message_calls_for_has_a_cue_in_its_own_words(records):
    for r in records:
        reasons = r["cot"]["traits"]
        assert reasons.keys() == r["traits"].keys() and r["cot"]["situation"].strip(), r["id"]
        for trait, value in r["traits"].items():
            assert reasons[trait]["pole"] == {1: "high", -1: "low"}[value], r["id"]
            assert reasons[trait]["cue"] in r["query"] and 1 <= len(reasons[trait]["cue"].split()) <= 10, r["id"]


def test_messages_and_answers_have_their_lengths_and_name_no_trait(records):
    for r in records:
        assert 6 <= len(r["query"].split()) <= 115 and 25 <= len(r["response"].split()) <= 75, r["id"]
        assert not NAMES_A_TRAIT.search(r["query"] + " " + r["response"]), r["id"]
    assert len({normalise_query(r["query"]) for r in records}) == len({r["response"] for r in records}) == len(records)


def test_poles_are_balanced_and_answers_do_not_begin_alike(records):
    counts = sum(active_experts(r["traits"]) for r in records)
    assert len(records) >= 3000 and counts.max() < 1.05 * counts.min()
    openings = Counter(" ".join(r["response"].lower().split()[:2]) for r in records)
    assert openings.most_common(1)[0][1] < len(records) / 100


def test_one_writer_is_the_test_another_the_validation_and_two_domains_are_never_trained_on(records):
    """An id is the writer's, a dash and a number. So the test asks whether a run holds for a stranger."""
    splits, zero = load_data(DATA / "personacot.jsonl")
    writers = {name: {r["id"].split("-")[0] for r in part} for name, part in splits.items()}
    held_out = {"sport", "pets and garden"}
    assert zero == 0 and writers["validation"] == {"p9"} and not writers["train"] & {"p3", "p9"}
    for r in records:
        stranger = r["id"].split("-")[0] == "p3"
        assert r["split"] == "test" if stranger or r["domain"] in held_out else r["split"] in ("train", "validation")


def test_contrast_answers_forty_messages_in_all_ten_manners():
    records = read_records(DATA / "contrast.jsonl")
    poles = {}
    for r in records:
        assert r["split"] == "test"
        poles.setdefault(r["query"], []).extend(active_experts(r["traits"]).nonzero()[:, 0].tolist())
    assert len(records) == 400 and len(poles) == 40 and all(sorted(found) == [*range(10)] for found in poles.values())


def test_pairs_are_of_test_messages_and_lack_one_cue(records):
    pairs = [json.loads(line) for line in (DATA / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    by_id, removed = {r["id"]: r for r in records}, Counter()
    for pair in pairs:
        source, (trait, value), = by_id[pair["of"]], *pair["removed"].items()
        assert source["split"] == "test" and source["query"] == pair["query"], pair["id"]
        assert source["traits"] == pair["removed"] | pair["kept"], pair["id"]
        assert source["cot"]["traits"][trait]["cue"] not in pair["without"], pair["id"]
        assert all(source["cot"]["traits"][kept]["cue"] in pair["without"] for kept in pair["kept"]), pair["id"]
        removed[EXPERTS[2 * TRAITS.index(trait) + (value < 0)]] += 1
    assert removed == dict.fromkeys(EXPERTS, 12)


def test_six_cultures_retell_twenty_situations_that_call_for_the_same(records):
    """Each situation comes first as its source tells it, which names no culture."""
    told, by_id, found = read_records(DATA / "cultures.jsonl", need_response=False), {r["id"]: r for r in records}, {}
    for r in told:
        source = by_id[r["of"]]
        assert r["split"] == "test" and (r["traits"], r["domain"]) == (source["traits"], source["domain"]), r["id"]
        assert r["cues"].keys() == r["traits"].keys() and 6 <= len(r["query"].split()) <= 115, r["id"]
        assert all(cue in r["query"] and 1 <= len(cue.split()) <= 10 for cue in r["cues"].values()), r["id"]
        assert not NAMES_A_TRAIT.search(r["query"]), r["id"]
        assert "culture" in r or (r["id"], r["query"]) == (source["id"], source["query"])
        found.setdefault(r["of"], []).append(r.get("culture"))
    assert len(found) == 20 and all(told == [None, "Japanese", "Nigerian", "German", "Mexican", "Indian", "Egyptian"]
                                    for told in found.values())
    assert len({normalise_query(r["query"]) for r in told}) == 140
