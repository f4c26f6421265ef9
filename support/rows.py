"""From records to batches: what a row is, its tokens (kept, so that texts are tokenised once), and the order of rows.

What is notable:
- rows of similar length go together, and batches come in random order, so that little is padding and lengths do not grow
- a batch is cut into micro-batches of at most so many tokens, padding included
- thousands of texts are tokenised in one call of the library, on all cores, and kept in the run folder under a hash of
  what they hang on
"""
import hashlib
import inspect
import json
from copy import copy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from safetensors.torch import save_file
import tokenizers
import torch

from router import active_experts, query_ids
from support.chat import Chat, encode
from support.files import UserError, atomic, open_safetensors
from support.process import rank_and_world_size
from support.records import messages_of


@dataclass
class Row:
    """One row of a batch. `ids` is prompt and reply for the base, `query` what the router reads."""
    id: str
    active: torch.Tensor            # (E,) of 0/1
    ids: np.ndarray | None = None
    prompt: int = 0                 # how many of ids are not supervised
    query: np.ndarray | None = None
    expert: int | None = None       # warm-up: the one expert that this row trains


class Ahead:
    """Stands in for a tokenizer while many texts are encoded: it notes what it is asked and answers with nothing, and
    once `encode_all` has encoded all of that in one call, on all cores, it answers with the ids."""

    def __init__(self, tokenizer):
        self.tokenizer, self.token_to_id, self.known = tokenizer, tokenizer.token_to_id, {}

    def encode(self, text, add_special_tokens=False):
        return self.known.setdefault(text, SimpleNamespace(ids=[]))

    def encode_all(self):
        found = self.tokenizer.encode_batch_fast(list(self.known), add_special_tokens=False)
        self.known = dict(zip(self.known, found))


AT_ONCE = 4096  # records whose texts are encoded in one go


def tokenised(records, tokenise, tokenizer, facts=(), file=None):
    """[(ids, how many of them are the prompt)] of all records, in their order, as tokenise(tokenizer, record) has them.

    With a file, they are kept there, for the stages to come and for a resumed run. What is kept holds for these texts,
    this tokenizer, `facts` (what else the format hangs on), the library's version and this code, of which its key is a
    hash, and for the ids that it was written with. Anything else that stands there, half a file too, is made anew.
    """
    key = hashlib.sha256()
    if file is not None:
        code = [inspect.getsource(part) for part in (Chat, encode, query_ids, messages_of, Ahead, tokenised, make_rows)]
        key.update(json.dumps([*code, *facts, tokenizers.__version__, tokenizer.to_str()]).encode())
        for record in records:
            key.update(json.dumps([messages_of(record), record.get("response")]).encode())
        try:
            with open_safetensors(file) as kept:
                tokens = kept.get_tensor("tokens").numpy()
                whole = kept.metadata() == {"key": f"{key.hexdigest()} {hashlib.sha256(tokens).hexdigest()}"}
        except UserError:
            whole = False
        if whole:
            lengths, prompts, ids = np.split(tokens, [len(records), 2 * len(records)])
            return list(zip(np.split(ids, lengths.cumsum()[:-1]), prompts.tolist()))
    found = []
    for at in range(0, len(records), AT_ONCE):
        ahead = Ahead(tokenizer)
        for record in records[at:at + AT_ONCE]:
            tokenise(ahead, record)
        ahead.encode_all()
        found += [tokenise(ahead, record) for record in records[at:at + AT_ONCE]]
    found = [(np.array(ids, dtype=np.int32), prompt) for ids, prompt in found]
    if file is not None and rank_and_world_size()[0] == 0:
        tokens = np.concatenate([np.array([[len(ids), prompt] for ids, prompt in found], dtype=np.int32).T.flatten(),
                                 *(ids for ids, _ in found)])  # all lengths, then all prompts', then all ids
        with atomic(file) as part:
            save_file({"tokens": torch.from_numpy(tokens)}, part,
                      metadata={"key": f"{key.hexdigest()} {hashlib.sha256(tokens).hexdigest()}"})
    return found


def make_rows(records, chat=None, tokenizer=None, limit=None, folder=None):
    """Records -> Examples; with `chat` for the base, with `tokenizer` for the encoder. Both tokenizers are asked here
    and nowhere else in training, and only once where there is a folder to keep the tokens in. Returns also how many
    were left out because they are longer than `limit` tokens."""
    base, encoder = (folder and folder / f"{role}.safetensors" for role in ("base", "encoder"))

    def for_base(tokenizer, record):
        own = copy(chat)
        own.tokenizer = tokenizer
        ids, supervised = own.example(messages_of(record), record["response"])
        return ids, supervised.index(True)

    def for_encoder(tokenizer, record):
        return query_ids(tokenizer, record["query"], record.get("history") or ()), 0

    rows = [Row(str(record["id"]), active_experts(record["traits"])) for record in records]
    if tokenizer is not None:
        for row, (ids, _) in zip(rows, tokenised(records, for_encoder, tokenizer, (), encoder)):
            row.query = ids
    if chat is None:
        return rows, 0
    facts = chat.bos, chat.end, chat.dates, chat.default_system
    for row, (ids, prompt) in zip(rows, tokenised(records, for_base, chat.tokenizer, facts, base)):
        row.ids, row.prompt = ids, prompt
    short = [row for row in rows if not limit or len(row.ids) <= limit]
    return short, len(rows) - len(short)


def rows_per_pole(rows):
    """Warm-up's rows: one for every record and active pole."""
    return [Row(row.id, row.active, row.ids, row.prompt, row.query, expert)
            for row in rows for expert in row.active.nonzero()[:, 0].tolist()]


def n_tokens(row):
    """Tokens that a row costs: those of the base's text where there is one."""
    return len(row.query if row.ids is None else row.ids)


POOL = 50  # batches among which rows are sorted by length: more is less padding and less chance


def batches(lengths, batch, seed):
    """Endless batches of row numbers. Rows of similar length go together: pools of up to POOL batches are drawn at
    random, sorted by length, cut into batches, and the batches shuffled. A pool is never larger than an epoch."""
    rng, stream = np.random.default_rng(seed), []
    size = min(POOL * batch, max(len(lengths) // batch, 1) * batch)
    while True:
        while len(stream) < size:
            stream += rng.permutation(len(lengths)).tolist()
        drawn, stream = sorted(stream[:size], key=lengths.__getitem__), stream[size:]
        cut = [drawn[i:i + batch] for i in range(0, size, batch)]
        for i in rng.permutation(len(cut)):
            yield cut[i]


def micro_batches(rows, tokens, length=n_tokens):
    """Cut a step's rows, by length, into groups whose padded size stays within `tokens`. A group that already fills an
    eighth of that ends where one more row would make more than 5 % of it padding."""
    group, real = [], 0
    for row in sorted(rows, key=length):
        real, padded = real + length(row), length(row) * (len(group) + 1)
        if group and (padded > tokens or padded > tokens / 8 and real < 0.95 * padded):
            yield group
            group, real = [], length(row)
        group.append(row)
    yield group
