"""Laws of the data: the record's reader, the splits, the template teacher and its text, the tiny models, and the
command line that the three programs share."""
import dataclasses
import json
import re
from itertools import permutations

import pytest
import torch

import eval as evaluation
import synth
import train
from support import checkpoints
from support import command
from support import review
from lora import EXPERTS, TRAITS
from model import Transformer
from router import active_experts
from support.chat import Chat
from support.command import parse
from support.files import UserError
from support.records import SPLITS, check_record, load_data, read_records, split_records, write_records
from support.tiny import make_tiny
from synth import lab, signatures, template_records


def record(number=0, **changes):
    return {"id": f"r{number}", "query": f"What now, number {number}?", "response": "Wait.",
            "traits": {"openness": 1}} | changes


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def without(key, **changes):
    return {k: v for k, v in record(**changes).items() if k != key}


def folded(text):
    return " ".join(text.lower().split())


# ----------------------------------------------------------------------------------------------------------------------
# Records

def test_what_is_read_is_what_was_written_with_unknown_fields_in_their_order(tmp_path):
    records = [record(0, zeta=[1, {"b": None}], history=[{"role": "user", "content": "Hi"}], culture="日本"),
               {"later": 1.5, **record(1, traits={"neuroticism": -1, "openness": 0}), "alpha": "ü\u2028\u0085 \"q\"\n"}]
    write_records(tmp_path / "new" / "r.jsonl", records)
    found = read_records(tmp_path / "new" / "r.jsonl")
    assert found == records and [list(r) for r in found] == [list(r) for r in records]
    write_records(tmp_path / "again.jsonl", found)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "new" / "r.jsonl").read_bytes()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "r.jsonl"
    write_records(file, [record()])
    before = file.read_bytes()
    with pytest.raises(TypeError):
        write_records(file, [record(1), record(2, odd={1, 2})])  # a set is no JSON
    assert file.read_bytes() == before and read_records(file) == [record()]


@pytest.mark.parametrize("text", [
    b"\xef\xbb\xbf" + lines(record(), record(1)), lines(record(), record(1)).replace(b"\n", b"\r\n"),
    b"\n  \n" + lines(record()) + b"\r\n\t\n" + lines(record(1)) + b"\n", lines(record(), record(1)).rstrip()],
    ids=["byte order mark", "CRLF", "blank lines", "no newline at the end"])
def test_records_are_read_whatever_the_editor_made_of_the_lines(tmp_path, text):
    (tmp_path / "r.jsonl").write_bytes(text)
    assert read_records(tmp_path / "r.jsonl") == [record(), record(1)]


def test_blank_lines_count_in_line_numbers(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b"\n\n" + lines(record()) + b"\n{}\n")
    with pytest.raises(UserError, match=r"r\.jsonl, line 5: no 'id'"):
        read_records(tmp_path / "r.jsonl")


REFUSED = {  # what stands on line 2, and what the message says of it
    "torn line": (b'{"id": "r1", "query": "What', "not JSON.*torn"),
    "not UTF-8": ('{"id": "r1", "query": "Où"}'.encode("latin-1"), "not UTF-8"),
    "a list": (b'["id"]', "found a list, expected a JSON object"),
    "a number": (b"7", "found a int"),
    "no id": (lines(without("id")), "no 'id'"),
    "no query": (lines(without("query", number=1)), "no 'query'"),
    "no response": (lines(without("response", number=1)), "no 'response'"),
    "no traits": (lines(without("traits", number=1)), "no 'traits'"),
    "empty query": (lines(record(1, query=" \n")), "query is ' .n', expected some text"),
    "query a number": (lines(record(1, query=3)), "query is 3, expected some text"),
    "empty response": (lines(record(1, response="")), "response is '', expected some text"),
    "response null": (lines(record(1, response=None)), "response is None, expected some text"),
    "id a list": (lines(record(1, id=["r1"])), "id is"),
    "id true": (lines(record(1, id=True)), "id is True"),
    "id null": (lines(record(1, id=None)), "id is None"),
    # JSON can spell half a character; no file and no tokenizer can hold it
    "half a surrogate pair": (lines(record(1, query="x \ud800")), "(query|surrogate|Unicode)"),
    "unknown trait": (lines(record(1, traits={"openess": 1})), "unknown trait 'openess', expected one of openness"),
    "value 2": (lines(record(1, traits={"openness": 2})), "openness is 2, expected -1, 0 or 1"),
    "value true": (lines(record(1, traits={"openness": True})), "openness is True, expected -1, 0 or 1"),
    "value 0.5": (lines(record(1, traits={"openness": 0.5})), "openness is 0.5, expected -1, 0 or 1"),
    "value a text": (lines(record(1, traits={"openness": "1"})), "openness is '1', expected -1, 0 or 1"),
    "value null": (lines(record(1, traits={"openness": None})), "openness is None, expected -1, 0 or 1"),
    "value a list": (lines(record(1, traits={"openness": [1]})), r"openness is \[1\], expected -1, 0 or 1"),
    "traits a list": (lines(record(1, traits=["openness"])), "traits is .*expected an object"),
    "history a text": (lines(record(1, history="Hi")), "history: expected a list"),
    "history of texts": (lines(record(1, history=["Hi"])), "history: expected a list"),
    "history without content": (lines(record(1, history=[{"role": "user"}])), "history: expected a list"),
    "history of an odd role": (lines(record(1, history=[{"role": "bot", "content": ""}])), "history: expected a list"),
    "same id": (lines(record(0, query="Another?")), "id 'r0' stands on line 1 already"),
}


@pytest.mark.parametrize("line, why", REFUSED.values(), ids=REFUSED)
def test_what_is_no_record_is_refused_by_file_and_line(tmp_path, line, why):
    (tmp_path / "some.jsonl").write_bytes(lines(record()) + line.rstrip(b"\n") + b"\n" + lines(record(2)))
    with pytest.raises(UserError, match=rf"some\.jsonl, line 2: .*{why}") as error:
        read_records(tmp_path / "some.jsonl")
    assert "\n" not in str(error.value)


def test_one_id_in_two_kinds_is_one_id(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(lines(record(id=7), record(1, id="7")))
    with pytest.raises(UserError, match="line 2: id '7' stands on line 1 already"):
        read_records(tmp_path / "r.jsonl")


@pytest.mark.parametrize("text", [b"", b"\xef\xbb\xbf\n \r\n", None], ids=["empty", "blank", "missing"])
def test_a_file_without_records_is_refused_by_name(tmp_path, text):
    if text is not None:
        (tmp_path / "none.jsonl").write_bytes(text)
    with pytest.raises(UserError, match=r"none\.jsonl: (no records|No such file)"):
        read_records(tmp_path / "none.jsonl")


def test_the_router_needs_no_responses_but_one_that_is_there_is_checked(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(lines(without("response"), record(1)))
    assert len(read_records(tmp_path / "r.jsonl", need_response=False)) == 2
    with pytest.raises(UserError, match="line 1: no 'response'"):
        read_records(tmp_path / "r.jsonl")
    assert "expected some text" in check_record(record(response="  "), need_response=False)


# ----------------------------------------------------------------------------------------------------------------------
# Splits

def test_two_records_of_one_query_never_part():
    """Case and white space do not make another query: a test query that was trained on would measure memory."""
    twins = [[record(i), record(i, query=f"  WHAT now,\t number {i}? \n")] for i in range(300)]
    where = {}
    for name, records in split_records([r for pair in twins for r in pair]).items():
        for r in records:
            where.setdefault(folded(r["query"]), set()).add(name)
    assert len(where) == 300 and all(len(names) == 1 for names in where.values())


def test_splits_are_fixed_by_the_seed_and_about_eighty_ten_ten():
    records = [record(i) for i in range(5000)]
    splits = split_records(records, 3)
    assert list(splits) == list(SPLITS) and splits == split_records(records, 3) != split_records(records, 4)
    assert sorted(r["id"] for part in splits.values() for r in part) == sorted(r["id"] for r in records)
    for name, share in zip(SPLITS, (0.8, 0.1, 0.1)):
        assert abs(len(splits[name]) / 5000 - share) < 0.02
    # nobody's place depends on who else is there
    assert split_records(records[:50], 3)["test"] == [r for r in splits["test"] if r in records[:50]]


def test_data_are_a_folder_of_three_files_or_one_file_split_by_query(tmp_path):
    for i, name in enumerate(SPLITS):
        write_records(tmp_path / f"{name}.jsonl", [record(10 * i), record(10 * i + 1)])
    splits, zero = load_data(tmp_path)
    assert [[r["id"] for r in splits[name]] for name in SPLITS] == [["r0", "r1"], ["r10", "r11"], ["r20", "r21"]]
    assert zero == 0
    many = [record(i) for i in range(200)]
    write_records(tmp_path / "all.jsonl", many)
    assert load_data(tmp_path / "all.jsonl", 5) == (split_records(many, 5), 0)
    assert load_data(str(tmp_path / "all.jsonl"), 5)[0] != load_data(tmp_path / "all.jsonl", 6)[0]


def test_records_whose_traits_are_all_zero_are_left_out_and_counted(tmp_path):
    zeros = [record(1000, traits={}), record(1001, traits={"openness": 0}),
             record(1002, traits=dict.fromkeys(TRAITS, 0))]
    many = [record(i, traits={"openness": 0, "neuroticism": -1}) for i in range(200)]
    write_records(tmp_path / "all.jsonl", [*many[:100], *zeros, *many[100:]])
    splits, zero = load_data(tmp_path / "all.jsonl")
    assert zero == 3 and sorted(r["id"] for part in splits.values() for r in part) == sorted(r["id"] for r in many)


@pytest.mark.parametrize("bad", SPLITS)
def test_a_split_without_records_to_use_is_an_error_that_names_it(tmp_path, bad):
    for name in SPLITS:
        write_records(tmp_path / f"{name}.jsonl", [record(traits={} if name == bad else {"openness": 1})])
    with pytest.raises(UserError, match=f"no records with an active trait for {bad}; .*train, validation, test"):
        load_data(tmp_path)
    (tmp_path / f"{bad}.jsonl").unlink()
    with pytest.raises(UserError, match=rf"{bad}\.jsonl: No such file"):
        load_data(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The template teacher's text

def frames():
    """(kind, pole or domain, split, frame) of every sentence frame in data/lab.json."""
    for split in SPLITS:
        for frame in lab()["neutral"][split]:
            yield "neutral", None, split, frame
        for frame in lab()["closings"][split]:
            yield "closing", None, split, frame
        for name, place in lab()["domains"].items():
            for frame in place["openings"].get(split, ()):
                yield "opening", name, split, frame
        for name, pole in lab()["poles"].items():
            for kind in ("cues", "manner"):
                for frame in pole[kind][split]:
                    yield kind, name, split, frame


def test_the_lab_has_the_named_domains_and_two_are_held_out():
    domains, held_out = set(lab()["domains"]), lab()["held_out_domains"]
    assert len(domains) >= 8 and domains >= {"work", "family", "counselling", "friendship", "study", "customer service",
                                             "travel", "health"}
    assert len(set(held_out)) == len(held_out) == 2 and set(held_out) <= domains
    for name, place in lab()["domains"].items():
        found = {split for split in SPLITS if place["openings"].get(split)}
        assert found == ({"test"} if name in held_out else set(SPLITS))
    assert list(lab()["poles"]) == list(EXPERTS) and all(p["position"] in ("before", "after")
                                                         for p in lab()["poles"].values())


def test_no_frame_stands_in_two_splits_nor_twice_in_one():
    where = {}
    for kind, name, split, frame in frames():
        where.setdefault(folded(frame), []).append((kind, name, split))
    assert len(where) > 400 and {k: v for k, v in where.items() if len(v) > 1} == {}


def test_every_sentence_of_a_manner_has_the_signature_of_its_pole_and_of_no_other():
    """For every filling, so that a signature in a reply can only come from that pole's manner."""
    for e, (name, pole) in enumerate(lab()["poles"].items()):
        own = [int(i == e) for i in range(len(EXPERTS))]
        assert len(set(pole["phrases"])) == len(pole["phrases"]) >= 2
        for split in SPLITS:
            for frame in pole["manner"][split]:
                texts = {frame.format(phrase=a, other_phrase=b) for a, b in permutations(pole["phrases"], 2)}
                assert all(signatures(text) == own for text in texts), (name, frame)


def test_a_signature_belongs_to_one_pole_and_is_found_whatever_its_case_but_not_inside_a_word():
    everyone = [word for pole in lab()["poles"].values() for word in pole["signature"]]
    assert len(everyone) == len(set(everyone)) and all(word == folded(word) for word in everyone)
    for e, pole in enumerate(lab()["poles"].values()):
        for word in pole["signature"]:
            assert signatures(f"So, {word.upper()}!")[e] == 1 and signatures(f"so x{word}x so") == [0] * 10
    assert signatures("") == [0] * 10


def test_every_cue_has_a_cue_word_of_its_pole_and_of_no_other():
    """The label of a query can be read from it, and only one way. (Whole words, as in the signatures.)"""
    words = {name: re.compile(r"\b(?:" + "|".join(map(re.escape, pole["cue_words"])) + r")\b")
             for name, pole in lab()["poles"].items()}
    for name, pole in lab()["poles"].items():
        for split in SPLITS:
            for cue in pole["cues"][split]:
                assert [other for other in words if words[other].search(cue.lower())] == [name], cue
    for kind, _, _, frame in frames():
        if kind in ("opening", "closing"):
            assert not any(pattern.search(frame.lower()) for pattern in words.values()), frame


# ----------------------------------------------------------------------------------------------------------------------
# The template teacher's records

@pytest.fixture(scope="module")
def training():
    """20,000 records for training, as a user would make them. (Seconds: 2 on an idle core.)"""
    return template_records("train", 20_000)


@pytest.fixture(scope="module")
def all_splits(training):
    return {"train": training} | {split: template_records(split, 2000) for split in SPLITS[1:]}


def test_twenty_thousand_records_have_twenty_thousand_queries(training):
    assert len({folded(r["query"]) for r in training}) == len({r["id"] for r in training}) == 20_000


def test_more_records_than_there_are_queries_is_an_error_and_not_a_wait(monkeypatch):
    monkeypatch.setattr(synth, "template_record", lambda rng, *_: {"query": f"query {rng.randrange(20)}"})
    assert len(template_records("train", 20)) == 20
    with pytest.raises(UserError, match="too small for 21 different queries for train: it gave 20"):
        template_records("train", 21)


def test_the_same_seed_gives_the_same_records_and_another_seed_others(training):
    assert json.dumps(template_records("train", 500)) == json.dumps(training[:500])
    other = template_records("train", 500, seed=1)
    assert len({r["query"] for r in other} & {r["query"] for r in training[:500]}) < 5


def test_held_out_domains_are_half_of_the_test_records_and_in_no_others(all_splits):
    held_out = set(lab()["held_out_domains"])
    for name in ("train", "validation"):
        assert {r["domain"] for r in all_splits[name]} == set(lab()["domains"]) - held_out
    domains = [r["domain"] for r in all_splits["test"]]
    assert set(domains) == set(lab()["domains"])
    assert 0.45 < sum(d in held_out for d in domains) / len(domains) < 0.55


def test_no_query_is_in_two_splits(all_splits):
    train_, validation, test = ({folded(r["query"]) for r in all_splits[name]} for name in SPLITS)
    assert not train_ & validation and not train_ & test and not validation & test


def test_a_reply_is_the_neutral_one_between_the_sentences_of_its_manner(all_splits):
    for records in all_splits.values():
        for r in records[:2000]:
            parts = {place: [r["manner"][e] for e in EXPERTS if e in r["manner"]
                             and lab()["poles"][e]["position"] == place] for place in ("before", "after")}
            assert r["response"] == " ".join([*parts["before"], r["neutral"], *parts["after"]])


def test_a_reply_has_the_signatures_of_its_active_poles_and_no_query_or_neutral_reply_has_any(all_splits):
    for records in all_splits.values():
        for r in records[:3000]:
            assert signatures(r["response"]) == active_experts(r["traits"]).int().tolist()
            assert not any(signatures(r["neutral"])) and not any(signatures(r["query"])), r


def test_traits_manner_and_reasoning_name_the_same_poles(all_splits):
    counts = dict.fromkeys(range(1, 4), 0)
    for name, records in all_splits.items():
        for r in records:
            assert check_record(r) is None and "{" not in r["query"] + r["response"]
            poles = {f"{'high' if v == 1 else 'low'}_{t}" for t, v in r["traits"].items()}
            assert set(r["manner"]) == poles == {f"{why['pole']}_{t}" for t, why in r["cot"]["traits"].items()}
            assert r["query"].startswith(r["cot"]["situation"])
            for trait, why in r["cot"]["traits"].items():
                assert why["cue"] in lab()["poles"][f"{why['pole']}_{trait}"]["cues"][name]
                assert why["cue"] in r["query"]
            if name == "train":
                counts[len(poles)] += 1
    assert [round(counts[k] / 20_000, 1) for k in (1, 2, 3)] == [0.5, 0.3, 0.2]


def test_every_pole_is_called_for_about_equally_often(training):
    share = torch.stack([active_experts(r["traits"]) for r in training]).mean(0)
    assert (share - 0.17).abs().max() < 0.02  # 1.7 of ten on average


# ----------------------------------------------------------------------------------------------------------------------
# The tiny models

@pytest.fixture(scope="module", params=["base", "encoder"])
def tiny(request, training, tmp_path_factory):
    """(kind, two folders of the same seed and one of another)."""
    folders = [tmp_path_factory.mktemp("tiny") / name for name in ("once", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1)):
        make_tiny(request.param, folder, training[:300], seed, fit_base=lambda model, chat: None)
    return request.param, *folders


def test_tiny_models_are_bitwise_fixed_by_the_seed(tiny):
    _, once, again, other = tiny
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in once.iterdir()} == names
    assert all((once / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (once / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_tiny_models_are_model_folders_of_under_a_million_parameters(tiny):
    kind, folder, *_ = tiny
    model, chat = Transformer.from_pretrained(folder, torch.float32), Chat.from_dir(folder)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000 and model.config.tied
    assert model.config.qkv_bias == (kind == "encoder") and chat.llama == (kind == "base")
    assert chat.tokenizer.get_vocab_size() == model.config.vocab_size
    for name, p in model.named_parameters():  # the usual start: PyTorch's embeddings would be fifty times as large
        assert abs(p.std() - 0.02) < 0.002 if p.dim() == 2 else p.unique().tolist() == [float("norm" in name)], name
    for text in ("Wer rastet, der rostet — 日本 🙂", "tabs\tand\n\nlines"):  # bytes: no text is unknown
        ids = chat.tokenizer.encode(text, add_special_tokens=False).ids
        assert chat.tokenizer.decode(ids) == text
    ids = torch.tensor([chat.prompt([{"role": "user", "content": "Hello"}])])
    assert torch.isfinite(model(ids)).all()


def test_the_base_is_what_its_training_made_of_it(training, tmp_path):
    def fit_base(model, chat):
        assert chat.llama
        torch.nn.init.constant_(model.model.norm.weight, 3.0)
    for kind in ("base", "encoder"):
        make_tiny(kind, tmp_path / kind, training[:50], 0, fit_base)
        trained = Transformer.from_pretrained(tmp_path / kind, torch.float32).model.norm.weight
        assert trained.unique().tolist() == [3.0 if kind == "base" else 1.0]


def test_tiny_models_that_could_not_be_finished_are_not_there(training, tmp_path):
    def fit_base(model, chat):
        raise checkpoints.Stopped("stopped")
    with pytest.raises(checkpoints.Stopped):
        make_tiny("base", tmp_path / "base", training[:50], 0, fit_base)
    assert not (tmp_path / "base").exists()


def test_transformers_reads_the_tiny_tokenizers_alike(tiny):
    transformers = pytest.importorskip("transformers", reason="the reference, in requirements-dev.txt, is not here")
    _, folder, *_ = tiny
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Chat.from_dir(folder)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "My boss is furious."},
            {"role": "assistant", "content": "Wait."}, {"role": "user", "content": "And\nthen?"}]
    for messages in (talk, talk[1:2], talk[1:]):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == ours.prompt(messages)
    assert theirs.eos_token_id == ours.end
    assert theirs.encode("My boss is furious.", add_special_tokens=False) == ours.tokenizer.encode(
        "My boss is furious.", add_special_tokens=False).ids


# ----------------------------------------------------------------------------------------------------------------------
# The command line

CLASSES = [train.Args, synth.Args, review.Report, review.Split, review.Review, evaluation.Routing, evaluation.Ablate,
           evaluation.Ask, evaluation.Talk, evaluation.Export]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_argument_has_a_sentence(cls):
    sentences = command.field_help(cls)
    assert set(sentences) == {field.name for field in dataclasses.fields(cls)}
    for name, sentence in sentences.items():
        assert len(sentence) > 5 and sentence.endswith(".") and "\n" not in sentence, name


def test_arguments_are_the_dataclass_and_its_defaults():
    assert parse(train.Args, []) == train.Args()
    found = parse(train.Args, "--stage joint --lr 1e-3 --steps 7 --joint-gate uniform --recompute --data d".split())
    assert found == train.Args(stage="joint", lr=1e-3, steps=7, joint_gate="uniform", recompute=True, data="d")
    assert type(found.lr) is float and type(found.steps) is int


@pytest.mark.parametrize("argv, why", [
    ("--stge router", "unrecognized arguments: --stge"), ("router", "unrecognized arguments: router"),
    ("--stage all --ste 5", "unrecognized arguments: --ste"),  # no abbreviations: a new option could change them
    ("--stage pretrain", "invalid choice"), ("--preset huge", "invalid choice"), ("--dtype float16", "invalid choice"),
    ("--joint-gate oracle", "invalid choice"), ("--steps 1.5", "--steps: invalid int"),
    ("--lr fast", "--lr: invalid float"),
    ("--seed x", "--seed: invalid int"), ("--run", "--run: expected one argument"), ("--resume yes", "unrecognized"),
    ("--lr nan", "--lr is nan, expected a number from"), ("--tau inf", "--tau is inf"), ("--lam nan", "--lam is nan"),
    ("--tau 0", "--tau is 0"), ("--tau -1", "--tau is -1"), ("--contrastive-tau 0", "--contrastive-tau is 0"),
    ("--steps 0", "--steps is 0, expected a number from 1"), ("--batch -2", "--batch is -2"),
    ("--rank 0", "--rank is 0"), ("--tokens 0", "--tokens is 0"), ("--clip 0", "--clip is 0"),
    ("--alpha 0", "--alpha is 0"), ("--lr 0", "--lr is 0"),
    ("--lr-warmup 1.5", "--lr-warmup is 1.5, expected a number from 0 to 1"), ("--lam -0.1", "--lam is -0.1"),
    ("--seed -1", "--seed is -1"), ("--keep 0", "--keep is 0"), ("--save-every 0", "--save-every is 0"),
    ("--log-every 0", "--log-every is 0"), ("--eval-records 0", "--eval-records is 0"),
])
def test_arguments_that_make_no_sense_are_refused_in_one_line(argv, why):
    with pytest.raises(UserError, match=re.escape(why)) as error:
        parse(train.Args, argv.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argv", ["--seed 0", "--lam 0", "--lr-warmup 0", "--lr-warmup 1"])
def test_zero_is_a_number_where_it_means_something(argv):
    assert parse(train.Args, argv.split())


@pytest.mark.parametrize("argv, why", [
    ("ask --top-p 0 Hi", "--top-p is 0"), ("ask --top-p 1.1 Hi", "--top-p is 1.1"), ("ask", "ask needs queries"),
    ("ask --temperature -1 Hi", "--temperature is -1"), ("ask --max-new-tokens 0 Hi", "--max-new-tokens is 0"),
    ("routing --show 0", "--show is 0"), ("routing more", "unrecognized arguments: more"),
    ("measure", "invalid choice"),
    ("ablate --replies -1", "--replies is -1"), ("ablate --records 0", "--records is 0"), ("", "required: COMMAND"),
    ("routing --stage router", "invalid choice"), ("ablate --tau nan", "--tau is nan"),
    ("routing --r x", "unrecognized"),
])
def test_arguments_of_eval_that_make_no_sense_are_refused_in_one_line(argv, why):
    with pytest.raises(UserError, match=re.escape(why)) as error:
        evaluation.main(argv.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("program, argv, says", [
    (train, [], "--lr-warmup X"), (synth, [], "--overwrite"), (evaluation, [], "routing"),
    (evaluation, ["routing"], "--show N"), (evaluation, ["ablate"], "--control TEXT"),
    (evaluation, ["ask"], "--persona TEXT"), (evaluation, ["chat"], "--top-p X"), (evaluation, ["export"], "--as"),
    (synth, ["report"], "--json"), (synth, ["split"], "--hold-out TEXT"), (synth, ["review"], "--import TEXT")])
def test_help_names_every_argument_with_its_sentence_and_default_on_80_columns(program, argv, says, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        program.main([*argv, "--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and says in shown and "What is notable" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "--seed N" not in shown or "(default: 0)" in shown
    if program is not evaluation or argv:
        cls = (evaluation.COMMANDS | evaluation.COMMANDS | review.COMMANDS)[argv[0]][0] if argv else program.Args
        for name, sentence in command.field_help(cls).items():
            assert " ".join(sentence.split()) in " ".join(shown.split()), name
    if program is not evaluation and not argv:
        assert f"python {program.__name__}.py" in shown  # how it is used


def test_an_error_of_the_users_is_one_line_and_status_two(capsys):
    def fails():
        raise UserError("no such thing; look there")
    with pytest.raises(SystemExit) as left:
        command.run_command(fails)
    found = capsys.readouterr()
    assert left.value.code == 2 and found.out == ""
    assert found.err.endswith("error: no such thing; look there\n") and found.err.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        command.run_command(lambda: 130)
    assert left.value.code == 130
