# SPDX-License-Identifier: Apache-2.0
"""What a new site needs to begin: the first root of the roster, and the roster.

Nothing in an invitation is trusted because it is in there. The site compares the root's
fingerprint with the keeper, verifies the roster under that root, and takes the coordinator's name,
address and CA from what it verified; so the invitation has no fields for them that could differ.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.limits import LIMITS
from allograft.roster import bundle
from allograft.roster.client import root_fingerprint


@dataclass(frozen=True, slots=True)
class Invitation:
    """An invitation as read; the roster in it is yet to be verified.

    Attributes:
        root_json: The first root of the roster, which anchors all later ones.
        files: The roster's files.
    """

    root_json: bytes
    files: Mapping[str, bytes]

    @property
    def root_fingerprint(self) -> str:
        """What people compare with the keeper before they join."""
        return root_fingerprint(self.root_json)

    def to_bytes(self) -> bytes:
        """Canonical JSON, the content of `invitation.json`."""
        return canonical.dumps(
            {
                "v": 1,
                "root": base64.b64encode(self.root_json).decode("ascii"),
                "roster": base64.b64encode(bundle.pack(self.files)).decode("ascii"),
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Invitation:
        """Read an invitation.

        Raises:
            RejectedError: AG-ROS-014 malformed, AG-ROS-008 a malformed roster in it.
        """
        try:
            fields = canonical.as_object(
                canonical.loads(content, 2 * LIMITS.roster_bundle_bytes),
                {"v", "root", "roster"},
            )
            if fields["v"] != 1:
                raise RejectedError("AG-ROS-014", "an invitation of an unknown version")
            return cls(
                root_json=canonical.as_base64(fields["root"]),
                files=bundle.unpack(canonical.as_base64(fields["roster"])),
            )
        except RejectedError as error:
            if error.code == "AG-ROS-008":
                raise
            raise RejectedError("AG-ROS-014", f"invitation: {error.cause}") from error
