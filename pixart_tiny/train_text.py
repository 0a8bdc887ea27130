"""Stage `text`: a tokenizer for the captions, and a T5 that has learned to read them."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from sentencepiece import sentencepiece_model_pb2
from transformers import T5Tokenizer

from pixart_tiny import scenes
from pixart_tiny.data import SEED, draw_caption
from pixart_tiny.fit import Run, fit
from pixart_tiny.models import make_text_encoder

NOTHING = "nothing"  # the second object of a scene with one, and what a caption leaves open
VOCABULARY_SIZE = 384  # at most; the captions use 371 pieces


def make_tokenizer(folder: Path) -> T5Tokenizer:
    """A SentencePiece unigram model of the captions, with T5's special tokens and byte fallback."""
    rng = np.random.default_rng((SEED, 4))
    captions = [draw_caption(rng) for _ in range(20_000)]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY_SIZE,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    # With so few different words the trainer returns fragments: add every word as a piece, too.
    vocabulary = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for word in sorted({w for c in captions for w in re.findall(r"[a-z]+", c)}):
        if f"▁{word}" not in {p.piece for p in vocabulary.pieces}:
            vocabulary.pieces.add(piece=f"▁{word}", score=-3.0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(vocabulary.SerializeToString())
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=0, model_max_length=120)
    tokenizer.save_pretrained(folder)
    return tokenizer


def scene_questions() -> dict[str, list[str]]:
    """What every token must be able to answer about the whole scene: question → answers."""
    values = {"colour": [*scenes.COLOURS], "shape": [*scenes.SHAPES], "size": [*scenes.SIZES]}
    questions = {f"{name} {i}": [*each, NOTHING] for i in (0, 1) for name, each in values.items()}
    return questions | {
        "relation": [*scenes.RELATIONS, NOTHING],
        "background": [*scenes.BACKGROUNDS, NOTHING],
    }


def scene_answers(scene: scenes.Scene) -> list[int]:
    """The scene's answers to `scene_questions`, as class indices in the same order."""
    given = {"relation": scene.relation, "background": scene.background}
    for i, item in enumerate(scene.objects):
        given |= {f"{name} {i}": getattr(item, name) for name in ("colour", "shape", "size")}
    return [answers.index(given.get(q) or NOTHING) for q, answers in scene_questions().items()]


def train_text_encoder(run: Run) -> None:
    """Trains T5 on text alone: a linear head on every token must answer for the whole scene.

    PixArt takes a T5 that has read much text and freezes it. This is the same idea at this scale:
    the DiT learns about five times faster from these embeddings. Each token must also know whether
    it comes after the relation: without that hint the encoder knew all words for hundreds of steps,
    but not which of them belong together.
    """
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer(run.folder / "tokenizer")
    encoder = make_text_encoder(len(tokenizer)).to(run.device)
    sizes = [*(len(answers) for answers in scene_questions().values()), 2]
    head = torch.nn.Linear(encoder.config.d_model, sum(sizes)).to(run.device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def losses(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        captions = [draw_caption(rng) for _ in range(run.batch)]
        tokens = tokenizer(captions, padding=True, return_tensors="pt", return_offsets_mapping=True)
        answers = torch.tensor([scene_answers(scenes.parse_caption(c)) for c in captions])
        relation = torch.tensor([scenes.relation_position(c) for c in captions])
        behind = (tokens.offset_mapping[..., 0] >= relation[:, None]).long()
        valid = tokens.attention_mask.bool()
        targets = [*answers[:, :, None].expand(-1, -1, valid.shape[1]).unbind(1), behind]
        ids, mask = tokens.input_ids.to(run.device), tokens.attention_mask.to(run.device)
        logits = head(encoder(ids, mask).last_hidden_state[mask.bool()]).split(sizes, dim=-1)
        loss, right = torch.zeros((), device=run.device), []
        for logit, target in zip(logits, targets, strict=True):
            target = target[valid].to(run.device)
            loss = loss + F.cross_entropy(logit, target) / len(sizes)
            right.append((logit.argmax(-1) == target).float().mean())
        return {"loss": loss, "worst question wrong": 1 - torch.stack(right).min()}

    encoder.train()
    if fit(run, {"model": encoder, "head": head}, [optimizer], losses):
        encoder.save_pretrained(run.folder / "text_encoder")
        run.finish()
