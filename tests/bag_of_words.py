"""What a router is measured against: a logistic regression on the words of the message, one for each pole.

    pip install scikit-learn
    python tests/bag_of_words.py data/personacot.jsonl

Words and pairs of words are weighted by TF-IDF. The strength of regularisation is the one with the highest average
precision on the validation split.
"""
import sys
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import r_precision
from lora import EXPERTS
from router import active_experts
from support.measure import pole_precision, subsets
from support.records import load_data
from support.tables import print_table


def main(path):
    splits, _ = load_data(path)
    active = {name: np.array([active_experts(r["traits"]).numpy() for r in records])
              for name, records in splits.items()}
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    features = {"train": words.fit_transform(r["query"] for r in splits["train"])}
    features |= {name: words.transform(r["query"] for r in splits[name]) for name in ("validation", "test")}

    def mean_precision(scores, labels):
        return float(np.nanmean(pole_precision(scores, labels)))

    best = chosen = scores = 0
    for C in (1, 3, 10, 30):
        models = [LogisticRegression(C=C, max_iter=500).fit(features["train"], active["train"][:, e])
                  for e in range(len(EXPERTS))]
        validation, test = (np.stack([model.decision_function(features[name]) for model in models], 1)
                            for name in ("validation", "test"))
        if (found := mean_precision(validation, active["validation"])) > best:
            best, scores, chosen = found, test, C
    seen = {None} | {record.get("domain") for record in splits["train"]}  # as in support/measure.py
    new_domain = np.array([record.get("domain") not in seen for record in splits["test"]])
    print_table(["test messages", "number", "mean AP", "R-precision", "by chance"], [
        [name, len(part), mean_precision(scores[part], active["test"][part]),
         r_precision(scores[part], active["test"][part]), float(active["test"][part].mean())]
        for name, part in subsets(new_domain)],
        f"TF-IDF regression on {len(splits['train'])} messages of {path}, C {chosen} (validation: {best:.3f})")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/bag_of_words.py RECORDS.jsonl")
    main(sys.argv[1])
