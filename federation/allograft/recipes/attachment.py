# SPDX-License-Identifier: Apache-2.0
"""Attachments on disk, and strict reading of tensors.

Invariant: what is read has exactly the expected names, shapes and type, and only finite numbers;
anything more, less or different is refused before a model is touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from allograft.crypto import canonical
from allograft.durable import durable_write
from allograft.errors import RejectedError
from allograft.recipes.base import BUILT_IN_KINDS, Attachment, load_recipe

_TENSORS = "tensors.safetensors"
_MANIFEST = "attachment.json"

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def read_tensors(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    others: Mapping[str, torch.dtype] | None = None,
) -> dict[str, torch.Tensor]:
    """Read a safetensors file that must hold exactly the expected tensors.

    Args:
        path: The file.
        expected: Shapes by name.
        dtype: Their element type.
        others: Tensors that have another one.

    Raises:
        RejectedError: AG-RCP-003.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                wrong = len(names ^ set(expected))
                raise RejectedError("AG-RCP-003", f"{wrong} tensors are missing or unexpected")
            # Shapes first, from the header: nothing large is read for a file that does not fit.
            for name, shape in expected.items():
                if tuple(file.get_slice(name).get_shape()) != shape:
                    raise RejectedError("AG-RCP-003", f"tensor {name} has another shape")
            tensors = {name: file.get_tensor(name) for name in sorted(expected)}
    except (SafetensorError, OSError) as error:
        raise RejectedError("AG-RCP-003", f"cannot read it: {type(error).__name__}") from error
    for name, value in tensors.items():
        if value.dtype != (others or {}).get(name, dtype):
            raise RejectedError("AG-RCP-003", f"tensor {name} has another type")
        if not is_finite(value):
            raise RejectedError("AG-RCP-003", f"tensor {name} holds values that are not finite")
    return tensors


def is_finite(value: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite.

    By the extremes, which NaN passes through: one pass without temporaries, where `isfinite` took
    sixteen times as long on bfloat16 and two copies of the tensor.
    """
    return value.numel() == 0 or all(
        math.isfinite(float(end)) for end in torch.aminmax(value.detach())
    )


def attachment_digest(attachment: Attachment) -> str:
    """SHA-256 over an attachment's kind, id, facts, dose and tensors."""
    head = {
        "kind": attachment.kind,
        "id": attachment.attachment_id,
        "facts": attachment.facts.to_json(),
        "dose": attachment.dose,
    }
    whole = hashlib.sha256(canonical.dumps(head))
    for name, value in sorted(attachment.tensors.items()):
        whole.update(f"{name}:{value.dtype}:{tuple(value.shape)}\n".encode())
        whole.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def save_attachment(attachment: Attachment, directory: Path) -> None:
    """Write an attachment as a directory of safetensors and JSON.

    The manifest goes last and holds the tensors' digest, so a half-written directory is refused.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    content = save({name: value.contiguous() for name, value in attachment.tensors.items()})
    durable_write(directory / _TENSORS, content)
    manifest = {
        "v": 1,
        "kind": attachment.kind,
        "id": attachment.attachment_id,
        "facts": attachment.facts.to_json(),
        "dose": attachment.dose,
        "doses": list(attachment.doses),
        "report": dict(attachment.report),
        "tensors_sha256": hashlib.sha256(content).hexdigest(),
    }
    durable_write(directory / _MANIFEST, canonical.dumps(manifest))


def rewrite_dose(directory: Path, dose: float) -> None:
    """Change the dose of a stored attachment; its tensors are not touched.

    Raises:
        RejectedError: AG-RCP-004 if it is not there.
    """
    try:
        manifest = canonical.as_mapping(canonical.loads((directory / _MANIFEST).read_bytes()))
    except OSError as error:
        raise RejectedError("AG-RCP-004", f"cannot read it: {type(error).__name__}") from error
    durable_write(directory / _MANIFEST, canonical.dumps({**manifest, "dose": dose}))


def load_attachment(directory: Path, allowed: frozenset[str] = BUILT_IN_KINDS) -> Attachment:
    """Read an attachment that `save_attachment` wrote.

    Raises:
        RejectedError: AG-RCP-004 if a file is missing or changed, AG-RCP-001 for its kind.
    """
    try:
        manifest = canonical.loads((directory / _MANIFEST).read_bytes())
        content = (directory / _TENSORS).read_bytes()
    except OSError as error:
        raise RejectedError("AG-RCP-004", f"cannot read it: {type(error).__name__}") from error
    names = {"v", "kind", "id", "facts", "dose", "doses", "report", "tensors_sha256"}
    fields = canonical.as_object(manifest, names)
    if fields["tensors_sha256"] != hashlib.sha256(content).hexdigest() or fields["v"] != 1:
        raise RejectedError("AG-RCP-004", "the tensors are not those the manifest names")
    with safe_open(directory / _TENSORS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kind = canonical.as_text(fields["kind"])
    return Attachment(
        kind=kind,
        attachment_id=canonical.as_text(fields["id"]),
        facts=load_recipe(kind, allowed).read_facts(fields["facts"]),
        tensors=tensors,
        dose=canonical.as_number(fields["dose"]),
        doses=tuple(canonical.as_number(dose) for dose in canonical.as_list(fields["doses"])),
        report=canonical.as_mapping(fields["report"]),
    )
