"""Laws of synth.py: the template teacher and its text, the prompts and the steps, a model folder as the teacher, the
options."""
import json
import re
import shutil
from collections import Counter
from itertools import permutations

import pytest
import torch

import model as model_module
import synth
from lora import EXPERTS, TRAITS
from router import active_experts
from support.chat import Chat
from support.command import parse
from support.files import UserError
from support.records import SPLITS, check_record, load_data, normalise_query, read_records
from support.replies import Reply, RequestFailed
from support.tiny import make_tiny
from synth import QueryRejected, Synthesis, lab, signatures, template_records
from test_teachers import GOOD, POLED, TRAITS_OF_GOOD, asked, ids, lines, out, rejected, write  # noqa: F401


# ----------------------------------------------------------------------------------------------------------------------
# The template teacher's text

def frames():
    """(kind, pole or domain, split, frame) of every sentence frame in data/lab.json."""
    for split in SPLITS:
        yield from (("neutral", None, split, frame) for frame in lab()["neutral"][split])
        yield from (("closing", None, split, frame) for frame in lab()["closings"][split])
        for name, domain in lab()["domains"].items():
            yield from (("opening", name, split, frame) for frame in domain["openings"].get(split, ()))
        for name, pole in lab()["poles"].items():
            yield from ((kind, name, split, frame) for kind in ("cues", "manner") for frame in pole[kind][split])


def test_the_lab_has_the_named_domains_and_two_are_held_out():
    domains, held_out = lab()["domains"], lab()["held_out_domains"]
    assert set(domains) >= {"work", "family", "counselling", "friendship", "study", "customer service", "travel",
                            "health"}
    assert len(set(held_out)) == len(held_out) == 2 and set(held_out) <= set(domains)
    for name, domain in domains.items():
        found = {split for split in SPLITS if domain["openings"].get(split)}
        assert found == ({"test"} if name in held_out else set(SPLITS))
    assert list(lab()["poles"]) == list(EXPERTS)
    assert all(pole["position"] in ("before", "after") for pole in lab()["poles"].values())


def test_no_frame_is_in_two_splits_nor_twice_in_one():
    counts = Counter(normalise_query(frame) for *_, frame in frames())
    assert len(counts) > 400 and max(counts.values()) == 1


def test_every_sentence_of_a_manner_has_the_signature_of_its_pole_and_of_no_other():
    """For every filling, so that a signature in a reply can only come from that pole's manner."""
    for e, (name, pole) in enumerate(lab()["poles"].items()):
        own = [int(i == e) for i in range(len(EXPERTS))]
        assert len(set(pole["phrases"])) == len(pole["phrases"]) >= 2
        for split in SPLITS:
            for frame in pole["manner"][split]:
                texts = {frame.format(phrase=a, other_phrase=b) for a, b in permutations(pole["phrases"], 2)}
                assert all(signatures(text) == own for text in texts), (name, frame)


def test_a_signature_belongs_to_one_pole_and_is_found_in_any_case_but_not_inside_a_word():
    everyone = [word for pole in lab()["poles"].values() for word in pole["signature"]]
    assert len(everyone) == len(set(everyone)) and all(word == normalise_query(word) for word in everyone)
    for e, pole in enumerate(lab()["poles"].values()):
        for word in pole["signature"]:
            assert signatures(f"So, {word.upper()}!")[e] == 1 and signatures(f"so x{word}x so") == [0] * 10
    assert signatures("") == [0] * 10


def test_every_cue_has_a_cue_word_of_its_pole_and_of_no_other():
    """So the labels of a query can be read from it, in one way only."""
    words = {name: re.compile(r"\b(?:" + "|".join(map(re.escape, pole["cue_words"])) + r")\b")
             for name, pole in lab()["poles"].items()}
    for kind, name, _, frame in frames():
        if kind in ("cues", "opening", "closing"):
            found = [pole for pole in words if words[pole].search(frame.lower())]
            assert found == ([name] if kind == "cues" else []), frame


# ----------------------------------------------------------------------------------------------------------------------
# The template teacher's records

@pytest.fixture(scope="module")
def all_splits():
    """20,000 records for training, as a user would make them, and 2,000 for each other split. (A few seconds.)"""
    return {split: template_records(split, 20_000 if split == "train" else 2000) for split in SPLITS}


def test_all_queries_differ_within_a_split_and_between_splits(all_splits):
    queries = [normalise_query(r["query"]) for records in all_splits.values() for r in records]
    assert len(queries) == len(set(queries)) == 24_000
    assert len({r["id"] for records in all_splits.values() for r in records}) == 24_000


def test_more_records_than_there_are_queries_is_an_error_and_not_a_wait(monkeypatch):
    monkeypatch.setattr(synth, "template_record", lambda rng, *_: {"query": f"query {rng.randrange(20)}"})
    assert len(template_records("train", 20)) == 20
    with pytest.raises(UserError, match="too small for 21 different queries for train: it gave 20"):
        template_records("train", 21)


def test_the_same_seed_gives_the_same_records_and_another_seed_others(all_splits):
    first = all_splits["train"][:500]
    assert json.dumps(template_records("train", 500)) == json.dumps(first)
    other = template_records("train", 500, seed=1)
    assert len({r["query"] for r in other} & {r["query"] for r in first}) < 5


def test_held_out_domains_are_half_of_the_test_records_and_in_no_others(all_splits):
    held_out = set(lab()["held_out_domains"])
    for name, records in all_splits.items():
        assert {r["domain"] for r in records} == set(lab()["domains"]) - (held_out if name != "test" else set())
    domains = [r["domain"] for r in all_splits["test"]]
    assert 0.45 < sum(d in held_out for d in domains) / len(domains) < 0.55


def test_a_record_fits_together(all_splits):
    """Traits, manner and reasoning name the same poles. The reply is the neutral one between the sentences of its
    manner, and has the signatures of the active poles; the query and the neutral reply have none."""
    for name, records in all_splits.items():
        for r in records[:3000]:
            assert check_record(r) is None and "{" not in r["query"] + r["response"]
            poles = {f"{'high' if v == 1 else 'low'}_{t}" for t, v in r["traits"].items()}
            assert set(r["manner"]) == poles == {f"{why['pole']}_{t}" for t, why in r["cot"]["traits"].items()}
            parts = {place: [r["manner"][e] for e in EXPERTS if e in poles and lab()["poles"][e]["position"] == place]
                     for place in ("before", "after")}
            assert r["response"] == " ".join([*parts["before"], r["neutral"], *parts["after"]])
            assert signatures(r["response"]) == active_experts(r["traits"]).int().tolist()
            assert not any(signatures(r["neutral"])) and not any(signatures(r["query"])), r
            assert r["query"].startswith(r["cot"]["situation"])
            for trait, why in r["cot"]["traits"].items():
                assert why["cue"] in lab()["poles"][f"{why['pole']}_{trait}"]["cues"][name] and why["cue"] in r["query"]


def test_half_of_the_records_have_one_active_pole_and_all_poles_are_about_equally_frequent(all_splits):
    counts = Counter(len(r["traits"]) for r in all_splits["train"])
    assert [round(counts[k] / 20_000, 1) for k in (1, 2, 3)] == [0.5, 0.3, 0.2]
    share = torch.stack([active_experts(r["traits"]) for r in all_splits["train"]]).mean(0)
    assert (share - 0.17).abs().max() < 0.02  # 1.7 of ten on average


# ----------------------------------------------------------------------------------------------------------------------
# The steps

def separate(*replies, retries=0, **item):
    """A query after these replies, and the messages of all questions that were asked on the way."""
    query, questions = Synthesis({"id": 1, "query": "What now?"} | item, "separate", retries, "test"), []
    for reply in replies:
        questions.append(query.question.messages)
        if isinstance(reply, (str, tuple)):
            reply = Reply(*([reply] if isinstance(reply, str) else reply))
        query.tell(reply)
    return query, questions


def test_each_of_the_three_steps_sees_the_ones_before_and_all_is_kept():
    query, questions = separate(
        ("They wait.", False, 10, 3), (json.dumps(POLED), False, 20, 4), ("Wait.", False, 30, 5), domain="work",
        culture="Finnish", history=[{"role": "user", "content": "Earlier I slept."}])
    record = query.outcome
    assert check_record(record) is None and record["domain"] == "work" and record["culture"] == "Finnish"
    assert (record["response"], record["traits"]) == ("Wait.", TRAITS_OF_GOOD)
    assert record["cot"] == {"situation": "They wait.", "traits": {"openness": {"pole": "high", "cue": "ideas"},
                                                                   "neuroticism": {"pole": "low", "cue": ""}}}
    assert record["teacher"] == {"name": "test", "steps": "separate", "calls": 3, "tokens_read": 60,
                                 "tokens_written": 12}
    texts = [messages[-1]["content"] for messages in questions]
    for text in texts:
        assert "What now?" in text and "Finnish" in text and "Earlier I slept." in text and "$" not in text
    assert ["They wait." in text for text in texts] == [False, True, True]
    for expert, manner in synth.MANNERS.items():
        assert manner in texts[1] and (manner in texts[2]) == (expert in ("high_openness", "low_neuroticism"))
    assert not any(trait in texts[2].lower() for trait in TRAITS)  # the answer is not to name them


@pytest.mark.parametrize("steps", ["separate", "joint", "score"])
def test_a_query_with_dollars_braces_and_backslashes_reaches_the_teacher_unchanged(steps):
    odd = 'Costs $message $$5 {x} \\1 """ %s'
    assert odd in Synthesis({"id": 1, "query": odd}, steps, 0, "t").question.messages[-1]["content"]


def test_a_step_that_comes_as_json_or_with_its_name_is_understood():
    query, _ = separate('```json\n{"situation": "They wait."}\n```', json.dumps({"situation": "x", "traits": POLED}),
                        '**Response:** "Wait, "')
    assert query.outcome["cot"]["situation"] == "They wait." and query.outcome["response"] == "Wait,"
    assert separate("a", json.dumps(POLED), 'He said "wait"')[0].outcome["response"] == 'He said "wait"'
    assert "JSON" in separate('{"situation": "They')[0].outcome["reason"]
    for other in ('{"answer": "Wait."}', '```json\n{"text": "Wait."}\n```'):  # JSON is not taken for the text itself
        assert "no JSON object in it with the key situation" in separate(other)[0].outcome["reason"]


WRAPPED = {  # a text as JSON, where plain text was asked for
    "a fence": '```json\n{"response": "Wait."}\n```', "a fence on one line": '```json {"response": "Wait."}```',
    "CRLF": '```json\r\n{\r\n"response": "Wait."\r\n}\r\n```',
    "words before": 'Here is the JSON:\n{"response": "Wait."}',
    "words after": '```\n{"response": "Wait."}\n```\nDoes it {help}?', "capitals": '{"Response": "Wait."}',
    "other keys, too": '{"situation": "x", "response": "Wait."}', "bare": "{response: 'Wait.'}",
    "a fence, no JSON": "```text\r\nWait.\r\n```", "one line, no JSON": "```Wait.```", "a quote": "“Wait.”",
    "a language on one line": "```text Wait.```", "words before a bare object": "It is {response: 'Wait.'} then",
    "the name in quotes": '**"Response":** Wait.',
}


@pytest.mark.parametrize("text", WRAPPED.values(), ids=WRAPPED)
def test_json_where_plain_text_was_asked_for_is_read(text):
    assert separate("a", json.dumps(POLED), text)[0].outcome["response"] == "Wait."


@pytest.mark.parametrize("text, why", [
    ('{"answer": "Wait."}', "no JSON object in it with the key response"), ("{answer: 1}", "with the key response"),
    ('So: ```{"text": "Wait."}``` there', "with the key response"), ('Here: {"response": "Wai', "not complete"),
    ('{"response": "a"} or {"response": "b"}', "several"), ('{"response": 3.5, "x": {}', "not complete"),
    ("Here: {“response”: “Wait.”}", "curly quotes"), ('{"response": {"text": "Wait."}}', "expected a string"),
    ('{“response”: "Wait."}', "curly quotes"), ('```{"response": ["Wait."]}```', "expected a string"),
    ('{"answer": "Wai', "not complete")])
def test_json_that_could_be_read_in_two_ways_is_asked_for_again(text, why):
    query, questions = separate("a", json.dumps(POLED), text, "Wait.", retries=1)
    assert query.outcome["response"] == "Wait." and re.search(why, questions[-1][-1]["content"])


@pytest.mark.parametrize("text", ["Use {name} there.", "Sets are {1, 2}.", "a } b {", "Write \\frac{a}{b}: done.",
                                  'Use d = {"a": 1} for that.', "p {color: red} makes it red", "{name}, hold on",
                                  "{a: 1} is a dict", "p {color: red}", "```a``` and ```b```", "Use ```x {a: 1} y```",
                                  "{name}: hold {on}"])
def test_braces_and_fences_in_a_text_are_part_of_it(text):
    assert separate("a", json.dumps(POLED), text)[0].outcome["response"] == text


@pytest.mark.parametrize("bad, why", [(("They w", True), "cut off"), ("", "empty"), (" \n", "empty"), ('""', "empty"),
                                      ("```\n\n```", "empty")])
def test_a_text_that_is_empty_or_cut_off_is_not_taken(bad, why):
    assert why in separate(bad)[0].outcome["reason"]
    assert why in separate("a", json.dumps(POLED), bad)[0].outcome["reason"]


def test_a_response_in_another_script_than_the_query_is_not_taken():
    assert "wrong language" in separate("a", json.dumps(POLED), "请等一下。")[0].outcome["reason"]


def test_a_retry_shows_the_reply_and_the_complaint_and_every_step_may_be_retried():
    wrong, failed = json.dumps({"openness": "medium"}), RequestFailed("server: 500")
    query, questions = separate("They wait.", wrong, failed, json.dumps(POLED), "", "Wait.", retries=2)
    assert query.outcome["response"] == "Wait." and query.outcome["teacher"]["calls"] == 6
    assert [m["role"] for m in questions[2]] == ["system", "user", "assistant", "user"]
    assert questions[2][:2] == questions[1] and questions[2][2]["content"] == wrong
    assert "'medium', expected" in questions[2][3]["content"]
    assert questions[3] == questions[2]  # after a failed request the same question is asked again
    query, _ = separate("They wait.", wrong, failed, wrong, retries=2)
    assert "expected the pole" in query.outcome["reason"] and query.outcome["raw"] == wrong
    assert separate(RequestFailed("a"), RequestFailed("b"), retries=1)[0].outcome["reason"] == "b"


def test_waits_that_the_server_asks_for_use_up_no_tries_for_ten_minutes():
    wait, late = RequestFailed("server: 429", wait=60), RequestFailed("server: 503", wait=3600)
    query, _ = separate(*[wait] * 10, "They wait.", *[wait] * 9, json.dumps(POLED), late, "Wait.")
    assert query.outcome["response"] == "Wait." and query.outcome["teacher"]["calls"] == 23
    assert separate(*[wait] * 11)[0].outcome["reason"] == "server: 429"
    assert separate(late, late)[0].outcome["reason"] == "server: 503"
    assert separate(late, late, "They wait.", retries=1)[0].outcome is None


def test_a_thought_is_neither_kept_nor_taken_for_the_answer():
    def after(thought, text):
        return f"<think>{thought}</think>\n\n{text}<|im_end|>\n<|im_start|>user\nAnd?"
    query, questions = separate(after("Hm.", "They wait."), after('{"openness": "high"}', '{"openness": "low"}'),
                                after("No.", ""), after("No.", "Wait."), retries=1)
    assert query.outcome["cot"]["situation"] == "They wait." and query.outcome["response"] == "Wait."
    assert query.outcome["traits"] == {"openness": -1} and "think" not in json.dumps([query.outcome, questions])


def test_fields_of_a_query_cannot_pass_for_an_outcome():
    """A file of queries may have any field. Whether there is a response decides."""
    query, _ = separate("a", json.dumps(POLED), "Wait.", reason="why", teacher="me")
    assert query.outcome["reason"] == "why" and query.outcome["teacher"]["name"] == "test"


@pytest.mark.parametrize("steps", ["separate", "score"])
def test_a_query_that_the_teacher_rejects_is_not_tried_again(steps):
    query = Synthesis({"id": 1, "query": "What now?"}, steps, 9, "test")
    query.tell(Reply("They wait."))
    query.tell(QueryRejected("the prompt has 9,000 tokens, more than 8,192"))
    assert query.outcome["reason"].startswith("the prompt has") and query.outcome["teacher"]["calls"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# A model folder as the teacher

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen-shaped model of under a million parameters as initialised: what it writes is noise."""
    folder = tmp_path_factory.mktemp("local") / "tiny-qwen"
    make_tiny("encoder", folder, template_records("train", 50), 0, None)
    return folder


def local_command(folder, queries, out, *more):
    return ["--teacher", "local", "--model", str(folder), "--queries", str(queries), "--out", str(out),
            "--device", "cpu", *map(str, more)]


def test_a_batch_has_prompts_of_similar_length_and_finished_records_leave_it(folder, asked, out, tmp_path,  # noqa: F811
                                                                             monkeypatch):
    """The model's words are given; everything else is real. Every third query's first reply cannot be read."""
    chat, batches, tried = Chat.from_dir(folder), [], Counter()

    def generate(model, prompts, gate, limit, temperature, stops, generator):
        assert (gate, limit, temperature) == (None, 77, 0.25) and stops == chat.stops
        batches.append([len(prompt) for prompt in prompts])
        replies = []
        for prompt in prompts:
            number = int(re.search(r"number (\d+)", chat.text(prompt))[1])
            tried[number] += 1
            text = json.dumps(GOOD | {"response": f"Wait for {number}."})
            text = "no" if number % 3 == 0 and tried[number] == 1 else text
            replies.append([*chat.tokenizer.encode(text, add_special_tokens=False).ids, chat.end])
        return replies
    monkeypatch.setattr(synth, "generate", generate)
    long = [item | {"query": item["query"] + " So?" * (7 * i % 12)} for i, item in enumerate(lines(asked))]
    queries = write(tmp_path / "long.jsonl", *long)
    assert not synth.main(local_command(folder, queries, out, "--steps", "joint", "--batch", 4, "--max-new-tokens", 77,
                                        "--temperature", 0.25))
    records = {record["id"]: record for record in read_records(out)}
    assert set(records) == set(ids(asked)) and all(records[f"q{i}"]["response"] == f"Wait for {i}." for i in range(12))
    assert records["q1"]["teacher"]["name"] == "local:tiny-qwen" and records["q3"]["teacher"]["calls"] == 2
    assert records["q1"]["teacher"]["tokens_written"] == len(chat.tokenizer.encode(
        json.dumps(GOOD | {"response": "Wait for 1."}), add_special_tokens=False).ids) + 1
    assert [len(batch) for batch in batches] == [4, 4, 4, 3, 1]  # 12, and 4 again: full as long as there are queries
    assert all(batch == sorted(batch, reverse=True) for batch in batches)
    assert all(max(b) - min(b) < max(map(max, batches)) - min(map(min, batches)) for b in batches)


def test_a_model_folder_writes_thoughts_and_turns_that_are_not_kept(folder, asked, out, monkeypatch):  # noqa: F811
    chat = Chat.from_dir(folder)
    texts = [f"<think>Hm.</think>{text}" for text in ("They wait.", json.dumps(POLED), "Wait.</s> And?", "Wait.")]
    ended = [[*chat.tokenizer.encode(text, add_special_tokens=False).ids, chat.end] for text in texts]
    ended[3] = ended[3][:-1] + [chat.tokenizer.token_to_id("<|im_start|>"), *ended[0][:-1]]  # the next turn, cut off
    cut_off = chat.tokenizer.encode("<think>Wait.", add_special_tokens=False).ids
    given = iter([*ended[:3], *ended[:2], ended[3], cut_off])
    monkeypatch.setattr(synth, "generate", lambda model, prompts, *_, **__: [next(given) for _ in prompts])
    queries = write(out.with_name("few.jsonl"), *lines(asked)[:3])
    assert not synth.main(local_command(folder, queries, out, "--batch", 1, "--retries", 0))
    assert [(r["cot"]["situation"], r["traits"], r["response"]) for r in lines(out)] == [
        ("They wait.", TRAITS_OF_GOOD, "Wait.")] * 2
    (entry,) = rejected(out)
    assert entry["raw"] == "<think>Wait." and "cut off before the reply began" in entry["reason"]


@pytest.mark.parametrize("wanted", [False, True])
def test_a_local_teacher_compiles_its_decoding_step_if_asked_to(wanted, folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(synth, "compile_decoding", compiled.append)  # compiling takes a minute
    teacher = synth.LocalTeacher(parse(synth.Args, local_command(folder, "q", "o", *["--compile"] * wanted)))
    assert compiled == [teacher.model] * wanted


@pytest.mark.parametrize("wanted", [False, True])
def test_a_local_teacher_is_in_8_bits_if_asked_to(wanted, folder):
    teacher = synth.LocalTeacher(parse(synth.Args, local_command(folder, "q", "o", *["--int8"] * wanted)))
    assert (teacher.model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8) == wanted
    assert teacher.model.dtype == torch.float32


def test_a_choice_is_the_most_probable_whole_reply(folder):
    """Compared with each choice's log-probability, token by token, from the whole model's logits."""
    chat = Chat.from_dir(folder)
    teacher, seen = synth.LocalTeacher(parse(synth.Args, local_command(folder, "q", "o"))), set()
    with torch.no_grad():
        for p in teacher.model.parameters():
            p.mul_(6 if p.dim() == 2 else 1)  # as initialised, all next tokens are about equally probable
    for i in range(12):
        messages = [{"role": "user", "content": f"{'So ' * i}what, number {i}?"}]
        prompt, scores = chat.prompt(messages), {}
        for word in ("high", "low", "neither", "a", "b", "c", "no idea where"):
            row = prompt + chat.tokenizer.encode(word, add_special_tokens=False).ids + [chat.end]
            log_probs = teacher.model(torch.tensor([row])).log_softmax(-1)[0]
            scores[word] = sum(log_probs[t, row[t + 1]].item() for t in range(len(prompt) - 1, len(row) - 1))
        words = list(scores)
        while len(words) > 1:
            best = max(words, key=scores.get)
            assert teacher.choose(messages, tuple(words)) == best
            seen.add(best)
            words.remove(best)
    assert len(seen) > 3


@pytest.mark.parametrize("by", ["memory", "the model's context"])
def test_noise_is_rejected_and_too_long_prompts_are_not_read(by, folder, asked, out, tmp_path,  # noqa: F811
                                                             monkeypatch):
    if by == "memory":
        monkeypatch.setattr(synth.LocalTeacher, "MOST_TOKENS", 800)
    else:
        folder = shutil.copytree(folder, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 801}))
    queries = write(tmp_path / "long.jsonl", {"id": "long", "query": "So " * 900}, *lines(asked)[:2])
    assert not synth.main(local_command(folder, queries, out, "--max-new-tokens", 3, "--retries", 1))
    reasons = {entry["id"]: entry["reason"] for entry in rejected(out)}
    assert {entry["id"]: entry["teacher"]["calls"] for entry in rejected(out)} == {"long": 0, "q0": 2, "q1": 2}
    assert re.fullmatch(r"the prompt has [\d,]+ tokens, more than 800", reasons.pop("long"))
    assert reasons == dict.fromkeys(("q0", "q1"), "it was cut off; be briefer") and not ids(out)


def test_scored_traits_are_chosen_and_not_written(folder, asked, out, monkeypatch):  # noqa: F811
    chat = Chat.from_dir(folder)
    wait = [*chat.tokenizer.encode("wait").ids, chat.end]
    monkeypatch.setattr(synth, "generate", lambda model, prompts, *_, **__: [wait for _ in prompts])
    turn = iter("high low neither neither high".split() * 11 + ["neither"] * 5)
    monkeypatch.setattr(synth.LocalTeacher, "choose", lambda self, messages, choices: next(turn))
    assert not synth.main(local_command(folder, asked, out, "--steps", "score", "--batch", 1, "--retries", 0))
    assert len(ids(out)) == 11
    for record in read_records(out):
        assert record["traits"] == {"openness": 1, "conscientiousness": -1, "neuroticism": 1}
        assert record["cot"]["traits"]["conscientiousness"] == {"pole": "low", "cue": ""}
        assert record["response"] == "wait" and record["teacher"]["calls"] == 7
    (entry,) = rejected(out)
    assert entry["reason"].startswith("all-zero vector")


def test_ctrl_c_between_two_tokens_keeps_the_batches_before(folder, asked, out, monkeypatch, capsys):  # noqa: F811
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model_module.generate(*args, **kwargs)
    monkeypatch.setattr(synth, "generate", interrupted)
    command = local_command(folder, asked, out, "--max-new-tokens", 2, "--retries", 0, "--batch", 2)
    assert synth.main(command) == 130 and len(rejected(out)) == 4
    assert not synth.main(command) and sorted(entry["id"] for entry in rejected(out)) == sorted(ids(asked))
    assert "4 are done or rejected, 8 to do" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Options

@pytest.mark.parametrize("argv, why", [
    ("--teacher http", "--teacher http needs --out"),
    ("--teacher http --out o.jsonl", "--teacher http needs --queries"),
    ("--teacher http --out o.jsonl --queries q.txt --model m", "--teacher http needs --url: http: base"),
    ("--teacher local --out o.jsonl --queries q.txt", "--teacher local needs --model"),
    ("--teacher local --out o.jsonl --queries q.txt --model m --url x", "--url does not go with --teacher local"),
    ("--teacher http --out o.jsonl --queries q.txt --model m --url http://x/v1 --compile",
     "--compile does not go with --teacher http"),
    ("--teacher http --out o.jsonl --queries q.txt --model m --url http://x/v1 --int8",
     "--int8 does not go with --teacher http"),
    ("--out o.jsonl --queries q.txt", "--queries does not go with --teacher template"),
    ("--teacher local --out o.jsonl --queries q.txt --model m --overwrite", "never replaced: give another --out"),
    ("--teacher local --out o --queries q.txt --model m", "--out is o, expected a file named .jsonl"),
    ("--teacher http --out o.jsonl --queries q.txt --model m --url http://x --steps score", "only --teacher local"),
    ("--teacher local --out o.jsonl --queries nowhere.txt --model m", "nowhere.txt: No such file"),
    ("--teacher http --workers 0", "--workers is 0"), ("--teacher http --retries -1", "--retries is -1"),
    ("--teacher http --timeout nan", "--timeout is nan"), ("--teacher other", "invalid choice"),
    ("--count 50", "--teacher template needs --out"), ("--out x --count 9", "--count is 9, expected at least 10"),
    ("--out x --split dev", "invalid choice"), ("--out x --seed -3", "--seed is -3")])
def test_options_that_do_not_go_together_are_refused_and_nothing_is_made(tmp_path, monkeypatch, argv, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(why)) as error:
        synth.main(argv.split())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# The template teacher as a command

def test_an_output_folder_gets_three_splits_that_training_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert synth.main("--teacher template --out lab --count 100 --seed 3".split()) is None
    splits, n_zero = load_data(tmp_path / "lab")
    assert n_zero == 0 and splits == {
        name: template_records(name, count, 3) for name, count in zip(SPLITS, (80, 10, 10))}
    shown = capsys.readouterr().out
    assert all(f"lab/{name}.jsonl: " in shown for name in SPLITS) and splits["train"][0]["response"] in shown
    assert {p.name for p in (tmp_path / "lab").iterdir()} == {f"{name}.jsonl" for name in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_an_output_file_gets_the_records_of_one_split(tmp_path, split):
    file = tmp_path / "new" / "some.jsonl"
    synth.main(["--out", str(file), "--count", "5", *([] if split == "train" else ["--split", split])])
    assert read_records(file) == template_records(split, 5, 0)


def test_an_existing_file_is_replaced_only_with_overwrite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synth.main("--out lab --count 50".split())
    (tmp_path / "lab" / "train.jsonl").unlink()
    before = {p.name: p.read_bytes() for p in (tmp_path / "lab").iterdir()}
    with pytest.raises(UserError, match="lab/validation.jsonl exists already; --overwrite replaces it"):
        synth.main("--out lab --count 60".split())
    assert {p.name: p.read_bytes() for p in (tmp_path / "lab").iterdir()} == before
    synth.main("--out lab --count 60 --overwrite".split())
    assert [len(read_records(tmp_path / "lab" / f"{name}.jsonl")) for name in SPLITS] == [48, 6, 6]
    with pytest.raises(UserError, match="exists already"):
        synth.main("--out lab/test.jsonl --count 60".split())
