"""From records to rows of token ids, and from rows to batches.

Rows of similar length go together, so that little of a batch is padding. Batches come in random order, so that lengths
do not grow during training. A batch is split into micro-batches whose padded size stays within a token limit; a longer
row is one alone.
"""
from dataclasses import dataclass, replace

import numpy as np
import torch

from router import active_experts, query_ids
from support.records import messages_of


@dataclass
class Row:
    """One row of a batch: what the base reads, what the router reads, and the poles that the situation calls for."""
    id: str
    active: torch.Tensor            # (E,) of 0/1
    ids: np.ndarray | None = None   # prompt and reply, in the base's tokens
    n_prompt: int = 0               # ids[:n_prompt] are the prompt, ids[n_prompt:] the supervised reply
    query: np.ndarray | None = None  # the query, in the encoder's tokens
    expert: int | None = None       # the one expert that this row trains, in warm-up and where joint rehearses it

    @property
    def n_supervised(self):
        return 0 if self.ids is None else len(self.ids) - self.n_prompt


def make_rows(records, chat=None, tokenizer=None, max_tokens=None):
    """Returns (rows, number of records left out because prompt and reply have more than `max_tokens` tokens).

    chat: the base's chat format, or None where the base is not needed; then no record is left out, since `query_ids`
    cuts long queries. tokenizer: the encoder's, or None where the router is not needed. Training and evaluation encode
    records with replies here and nowhere else (but for the rows without a query that tiny's base is trained on).
    """
    rows = []
    for record in records:
        row = Row(str(record["id"]), active_experts(record["traits"]))
        if chat is not None:
            ids, supervised = chat.example(messages_of(record), record["response"])
            row.ids, row.n_prompt = np.array(ids, dtype=np.int32), supervised.index(True)
        if tokenizer is not None:
            ids = query_ids(tokenizer, record["query"], record.get("history") or ())
            row.query = np.array(ids, dtype=np.int32)
        rows.append(row)
    if chat is None or max_tokens is None:
        return rows, 0
    short_enough = [row for row in rows if len(row.ids) <= max_tokens]
    return short_enough, len(rows) - len(short_enough)


def rows_per_pole(rows):
    """Warm-up's rows: a copy of each row for each of its active poles, assigned to that pole's expert."""
    return [replace(row, expert=expert) for row in rows for expert in row.active.nonzero()[:, 0].tolist()]


def rehearsed(rows, share, rng):
    """Returns the rows of a joint step, of which each is, with probability `share`, assigned to one of its active
    poles' experts, drawn at random. rng: the generator of the data's order; with a share of 0, nothing is drawn."""
    if not share:
        return rows
    return [replace(row, expert=int(rng.choice(row.active.nonzero()[:, 0]))) if rng.random() < share else row
            for row in rows]


def n_tokens(row):
    """The number of tokens in a row: the base's where there are any, else the encoder's."""
    return len(row.query if row.ids is None else row.ids)


POOL = 50  # batches that are drawn and sorted together: more means less padding and less randomness


def batches(lengths, batch, seed):
    """Yield lists of row numbers for ever. The order depends on the arguments and on nothing else. seed: a seed, or a
    NumPy generator; then the order also depends on what else is drawn from it.

    A pool of up to POOL batches is drawn at random, sorted by length and cut into batches, which come in random order.
    A pool is at most one epoch, or one batch where there are fewer rows than that.
    """
    rng, stream = np.random.default_rng(seed), []
    size = min(POOL * batch, max(len(lengths) // batch, 1) * batch)
    while True:
        while len(stream) < size:
            stream += rng.permutation(len(lengths)).tolist()
        pool, stream = sorted(stream[:size], key=lengths.__getitem__), stream[size:]
        cut = [pool[i:i + batch] for i in range(0, size, batch)]
        for i in rng.permutation(len(cut)):
            yield cut[i]


def micro_batches(rows, max_tokens, length=n_tokens):
    """Yield groups of rows, shortest first, whose padded size is at most `max_tokens`. A longer row is a group alone.

    A group also ends before a row with which it would fill more than an eighth of `max_tokens` and more than 5 % of it
    would be padding.
    """
    group, n_real = [], 0
    for row in sorted(rows, key=length):
        n_real, n_padded = n_real + length(row), length(row) * (len(group) + 1)
        if group and (n_padded > max_tokens or n_padded > max_tokens / 8 and n_real < 0.95 * n_padded):
            yield group
            group, n_real = [], length(row)
        group.append(row)
    if group:
        yield group
