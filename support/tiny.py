"""The models of the preset tiny: a Llama-shaped base and a Qwen-shaped encoder, each of under a million parameters.

They are made when a run of this preset starts, so that it needs no download.
"""
import json

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora import EXPERTS
from model import Config, Transformer
from support.chat import CHATML_TEMPLATE, LLAMA_TEMPLATE, Chat, encode, load_tokenizer
from support.files import UserError, atomic, read_json
from support.rows import Row, make_rows
from synth import template_records

LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_missing_models(setup, fit_base):
    """Make the models inside the run folder that are missing or incomplete. Other folders are never written to.

    fit_base(model, rows) trains the base.
    """
    for role, folder in (("encoder", setup.encoder), ("base", setup.base)):
        if folder != str(setup.run / "models" / role):
            continue
        try:
            Transformer.from_pretrained(folder)
            load_tokenizer(folder)
            read_json(f"{folder}/tokenizer_config.json")
        except UserError:
            make_tiny(role, folder, template_records("train", 2000, setup.seed), setup.seed, fit_base)


def make_tiny(role, folder, records, seed, fit_base):
    """Write a model folder like any published one: the "base" is Llama-shaped and trained by `fit_base(model, rows)`,
    the "encoder" is Qwen-shaped and stays as initialised. The tokenizer is trained on the records' texts."""
    llama = role == "base"
    special = LLAMA_TOKENS if llama else CHATML_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for r in records for text in (r["query"], r["response"])] + ["system user assistant"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    config = {"model_type": "llama" if llama else "qwen2", "hidden_act": "silu", "tie_word_embeddings": True,
              "architectures": ["LlamaForCausalLM" if llama else "Qwen2ForCausalLM"],
              "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 128, "intermediate_size": 352,
              "num_hidden_layers": 3 if llama else 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "rms_norm_eps": 1e-5 if llama else 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048,
              "eos_token_id": tokenizer.token_to_id(special[-1]), "bos_token_id": tokenizer.token_to_id(special[0])}
    with atomic(folder) as part:
        part.mkdir()
        tokenizer.save(str(part / "tokenizer.json"))
        (part / "config.json").write_text(json.dumps(config, indent=2))
        (part / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[-1],
            "chat_template": LLAMA_TEMPLATE if llama else CHATML_TEMPLATE}, indent=2))
        torch.manual_seed(seed)
        model = Transformer(Config.from_dir(part))
        for name, p in model.named_parameters():  # the weights of norms keep their initial value, 1
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(p)
        if llama:
            fit_base(model, pretraining_rows(records, Chat.from_dir(part)))
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, part / "model.safetensors",
                  metadata={"format": "pt"})


def pretraining_rows(records, chat):
    """Returns the rows that tiny's base is trained on: each record's query with its neutral reply, and its reply in the
    poles' manner without the query.

    So the base learns the words of every manner, but not when to use them. All tokens but the first are supervised,
    because the base has to learn the language.
    """
    rows, _ = make_rows([{**r, "response": r["neutral"]} for r in records], chat)
    for row in rows:
        row.n_prompt = 1
    alone = [Row(f"plain-{r['id']}", torch.zeros(len(EXPERTS)),
                 ids=np.array([chat.bos, *encode(chat.tokenizer, r["response"]), chat.end], dtype=np.int32), n_prompt=1)
             for r in records]
    return rows + alone
