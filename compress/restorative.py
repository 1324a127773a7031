"""Restore: make the weights ready for what compressing will do to them, before it is done (PTQ1.61's preprocessing, arXiv 2502.13179).

    Q₁ = compress(W);   train A, B:  KL(p_original ‖ p of Q₁ + (α/r)·B A);   W' = W + (α/r)·B A;   Ŵ = compress(W')

Below two bits the first result is so far from W that no rounding of W alone comes back. What a low-rank term wins on top of it tells where the weights
would have to lie for their rounding to do well; the sum is compressed in their place, and the term itself is not stored: not a byte more than without it.
We train on the divergence where the paper trains on the text. Cost: compressing twice and `steps` steps of healing (compress/heal.py) in between.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .artifact import LayerRecord
from .checkpoint import Checkpoint
from .errors import CompressError
from .formats import Sum, build
from .verification import ArtifactCheckpoint
from .views import Edit, edited


def restored(source: Checkpoint, healed: ArtifactCheckpoint) -> Checkpoint:
    """`source` whose weights have, as they are read, the low-rank terms added that healing with `merge: false` put on top of its compressed twin.

    Raises CompressError where a linear is no tensor of its own in the checkpoint's model class (fused experts).
    Where healing was undone nothing changes, and a note says so.
    """
    known, edits = source.model.state_dict(), dict[str, Edit]()

    def plus(path: str, record: LayerRecord, W: Tensor) -> Tensor:
        whole = build(record.format, {t: healed.read_stored(place) for t, place in record.places(path).items()})
        assert isinstance(whole, Sum)  # Ŵ, maybe of several terms, and last what healing added
        change = whole.terms[-1].dequantize()
        return W.float() + (change.T if isinstance(source.model.get_submodule(path), Conv1D) else change)

    for path, record in healed.manifest.layers.items():
        if f"{path}.weight" not in known:
            raise CompressError(f"{source.name}: restore: {path} is one of several experts in one tensor, which cannot be changed alone; leave out restore")
        if record.error_norm == "healing":
            edits[f"{path}.weight"] = partial(plus, path, record)
    view = edited(source, edits)
    if not edits:
        view.notes = [*view.notes, {"what": "nothing restored", "where": source.blocks_path, "count": 1,
                                    "detail": "low-rank terms won nothing on held-out text"}]  # fmt: skip
    return view
