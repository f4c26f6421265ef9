"""Laws of the tiny models: model folders like any published one, made on the spot and fixed by the seed."""
import re

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from model import Transformer
from router import active_experts
from support.chat import Chat
from support.checkpoints import Stopped
from support.measure import LoadedRun, RecordOptions, one_hot_gate
from support.tiny import make_tiny
from synth import signatures, template_records

RECORDS = template_records("train", 300)


def untrained(model, rows):
    pass


@pytest.fixture(scope="module", params=["base", "encoder"])
def tiny(request, tmp_path_factory):
    """(role, two folders of the same seed and one of another)."""
    folders = [tmp_path_factory.mktemp("tiny") / name for name in ("once", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1)):
        make_tiny(request.param, folder, RECORDS, seed, untrained)
    return request.param, *folders


def test_tiny_models_are_bitwise_fixed_by_the_seed(tiny):
    _, once, again, other = tiny
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in once.iterdir()} == names
    assert all((once / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (once / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_tiny_models_are_model_folders_of_under_a_million_parameters(tiny):
    role, folder, *_ = tiny
    model, chat = Transformer.from_pretrained(folder, torch.float32), Chat.from_dir(folder)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000 and model.config.tied
    assert model.config.qkv_bias == (role == "encoder") and (chat.bos is not None) == (role == "base")
    assert chat.tokenizer.get_vocab_size() == model.config.vocab_size
    for name, p in model.named_parameters():  # the usual start: PyTorch's embeddings would be fifty times as large
        assert abs(p.std() - 0.02) < 0.002 if p.dim() == 2 else p.unique().tolist() == [float("norm" in name)], name
    for text in ("Wer rastet, der rostet — 日本 🙂", "tabs\tand\n\nlines"):  # tokens are bytes, so no text is unknown
        assert chat.tokenizer.decode(chat.tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert torch.isfinite(model(torch.tensor([chat.prompt([{"role": "user", "content": "Hello"}])]))).all()


def test_only_the_base_is_trained_and_it_is_saved_as_trained(tmp_path):
    def fit_base(model, rows):
        assert rows
        torch.nn.init.constant_(model.model.norm.weight, 3.0)
    for role, weight in (("base", 3.0), ("encoder", 1.0)):
        make_tiny(role, tmp_path / role, RECORDS[:50], 0, fit_base)
        trained = Transformer.from_pretrained(tmp_path / role, torch.float32).model.norm.weight
        assert trained.unique().tolist() == [weight]


def test_a_tiny_model_that_was_not_finished_is_not_there(tmp_path):
    def fit_base(model, rows):
        raise Stopped("stopped")
    with pytest.raises(Stopped):
        make_tiny("base", tmp_path / "base", RECORDS[:50], 0, fit_base)
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


def pieces(text):
    """The four-word pieces of a text; a punctuation mark is a word."""
    words = re.findall(r"[\w']+|[^\w\s]", text.lower())
    return [tuple(words[i:i + 4]) for i in range(len(words) - 3)]


@pytest.mark.slow
def test_tiny_talks_its_experts_show_their_poles_and_health_raises_no_alarm(tmp_path, capsys):
    """The first command's run, whole. Most four-word pieces of its replies stand somewhere in its training text, so
    that they are sentences. After warm-up each expert writes its pole's signature, and after joint the mixture writes
    one of a pole that the query calls for."""
    assert train.main(["--preset", "tiny", "--run", str(tmp_path / "run")], show_results=False) is None
    run, warmup = (LoadedRun(RecordOptions(run=str(tmp_path / "run"), stage=stage)) for stage in ("joint", "warmup"))
    records = run.records(limit=100)[0]
    known = {piece for record in run.setup.load_data()["train"]
             for text in (record["query"], record["neutral"], record["response"]) for piece in pieces(text)}

    def share_known(replies):
        return np.mean([piece in known for reply in replies for piece in pieces(reply)])
    gates = run.gates(records)
    replies = train.generate_replies(run.model, run.chat, records, gates)
    assert share_known(train.generate_replies(run.model, run.chat, records[:50])) >= 0.97
    assert share_known(replies[:50]) >= 0.93
    shown = np.array([signatures(reply) for reply in replies])
    called = np.array([active_experts(record["traits"]).numpy() for record in records])
    assert (shown * called).any(1).mean() >= 0.6
    for e in range(10):
        calling = [record for record in run.records()[0] if active_experts(record["traits"]).tolist() == [
            float(pole == e) for pole in range(10)]][:20]
        alone = train.generate_replies(warmup.model, run.chat, calling, one_hot_gate(e).expand(len(calling), -1))
        assert np.mean([signatures(reply)[e] for reply in alone]) >= 0.8, e
    assert not evaluation.main(["health", "--run", str(tmp_path / "run")]), capsys.readouterr().out
