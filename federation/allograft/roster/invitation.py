# SPDX-License-Identifier: Apache-2.0
"""What a new site needs to begin: where the coordinator is, and a roster to check that by.

Nothing in an invitation is trusted because it is in there. The site compares the root's
fingerprint with the keeper, verifies the roster under that root, and takes address and CA from the
verified roster; the copies here are for people who read the file.
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
        coordinator_id: The coordinator's name.
        address: HOST:PORT that sites dial.
        tls_ca_pem: The private CA of the coordinator.
        root_json: The first root of the roster, which anchors all later ones.
        files: The roster's files.
    """

    coordinator_id: str
    address: str
    tls_ca_pem: str
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
                "coordinator": self.coordinator_id,
                "address": self.address,
                "tls_ca_pem": self.tls_ca_pem,
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
                {"v", "coordinator", "address", "tls_ca_pem", "root", "roster"},
            )
            if fields["v"] != 1:
                raise RejectedError("AG-ROS-014", "an invitation of an unknown version")
            return cls(
                coordinator_id=canonical.as_site(fields["coordinator"]),
                address=canonical.as_line(fields["address"]),
                tls_ca_pem=canonical.as_text(fields["tls_ca_pem"]),
                root_json=canonical.as_base64(fields["root"]),
                files=bundle.unpack(canonical.as_base64(fields["roster"])),
            )
        except RejectedError as error:
            if error.code == "AG-ROS-008":
                raise
            raise RejectedError("AG-ROS-014", f"invitation: {error.cause}") from error
