# SPDX-License-Identifier: Apache-2.0
"""The attachments that a recipient keeps on one model.

Invariant: the model's state follows from the set of attachments and their doses, not from the
order in which they came or went; with none left it is the plain base, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from transformers import PreTrainedModel

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.recipes.attachment import attachment_digest
from allograft.recipes.base import BUILT_IN_KINDS, Attachment, Handle, load_recipe


class Stack:
    """A model with the attachments that this stack put on it.

    Args:
        model: A plain base; changed in place by `attach` and `detach`.
        allowed: Kinds whose recipes may be loaded.
    """

    def __init__(self, model: PreTrainedModel, allowed: frozenset[str] = BUILT_IN_KINDS) -> None:
        self.model = model
        self._allowed = allowed
        self._handles: dict[str, Handle] = {}

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """What is attached, by id."""
        return tuple(self._handles[key].attachment for key in sorted(self._handles))

    def attach(self, attachment: Attachment) -> Handle:
        """Put an attachment on the model at its dose.

        Raises:
            RejectedError: AG-RCP-023 if it is already on it, and those of its recipe.
        """
        key = attachment.attachment_id
        if key in self._handles:
            raise RejectedError("AG-RCP-023", "the attachment is already on this model")
        handle = load_recipe(attachment.kind, self._allowed).attach(attachment, self.model)
        self._handles[key] = handle
        return handle

    def attach_all(self, attachments: Iterable[Attachment]) -> None:
        """Put several attachments on the model, or none of them if one is refused.

        Raises:
            AllograftError: As `attach`.
        """
        done: list[str] = []
        try:
            for attachment in attachments:
                self.attach(attachment)
                done.append(attachment.attachment_id)
        except BaseException:
            for key in done:
                self.detach(key)
            raise

    def set_dose(self, attachment_id: str, dose: float) -> None:
        """Change the dose of an attachment in place.

        Raises:
            RejectedError: AG-RCP-021 for a bad dose, AG-RCP-023 if it is not on the model.
        """
        self._handle(attachment_id).set_dose(dose)

    def detach(self, attachment_id: str) -> None:
        """Take an attachment off, whatever came before or after it.

        Raises:
            RejectedError: AG-RCP-023 if it is not on the model.
        """
        handle = self._handle(attachment_id)
        load_recipe(handle.attachment.kind, self._allowed).detach(handle)
        del self._handles[attachment_id]

    def _handle(self, attachment_id: str) -> Handle:
        handle = self._handles.get(attachment_id)
        if handle is None:
            raise RejectedError("AG-RCP-023", "the attachment is not on this model")
        return handle

    def digest(self) -> str:
        """SHA-256 (hex) that names this set of attachments at their doses."""
        return stack_digest(self.attachments)


def stack_digest(attachments: Iterable[Attachment]) -> str:
    """The digest of a set of attachments, without a model."""
    digests = sorted(attachment_digest(attachment) for attachment in attachments)
    return hashlib.sha256(canonical.dumps(list(digests))).hexdigest()
