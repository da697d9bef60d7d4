"""A sentencepiece model as a Hugging Face `tokenizer.json`, which serving libraries read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers

from nemocascade.data.errors import TokenizerError

_SPACE = "\u2581"


def sentencepiece_to_json(path: Path, special: Collection[str]) -> str:
    """Return the content of a `tokenizer.json` with the ids of the sentencepiece model at `path`.

    Spaces are kept verbatim, as this project reads such a model. special: texts that decoding skips
    as special tokens; other control pieces and the user's symbols are matched as whole tokens.

    Raises TokenizerError if the model is of a type that cannot be converted.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    kinds, trainer = proto.SentencePiece.Type, proto.trainer_spec
    pieces = [piece.piece for piece in proto.pieces]
    model: models.Model
    if trainer.model_type == trainer.BPE:
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        ranked = [
            (-piece.score, i)
            for i, piece in enumerate(proto.pieces)
            if piece.type == kinds.NORMAL and len(piece.piece) > 1
        ]
        model = models.BPE(
            vocabulary,
            [pair for _, i in sorted(ranked) for pair in _halves(pieces[i], vocabulary)],
            unk_token=pieces[trainer.unk_id],
            byte_fallback=trainer.byte_fallback,
            fuse_unk=True,
        )
    elif trainer.model_type == trainer.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(scores, trainer.unk_id, trainer.byte_fallback)
    else:
        raise TokenizerError(f"{path}: only BPE and unigram models have the form of tokenizer.json")
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if proto.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    matched = (kinds.CONTROL, kinds.USER_DEFINED)
    added = [p.piece for p in proto.pieces if p.type in matched or p.piece in special]
    tokenizer.add_tokens([AddedToken(t, special=t in special, normalized=False) for t in added])
    return tokenizer.to_str(pretty=True)


def _halves(piece: str, vocabulary: Collection[str]) -> Iterator[tuple[str, str]]:
    """The pairs of pieces that are merged to `piece`."""
    for cut in range(1, len(piece)):
        left, right = piece[:cut], piece[cut:]
        if left in vocabulary and right in vocabulary:
            yield left, right
