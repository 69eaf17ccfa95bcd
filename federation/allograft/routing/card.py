# SPDX-License-Identifier: Apache-2.0
"""Cards: what models a site runs and which packets it would consider.

A card is what the coordinator matches offers with. It holds digests and shapes, never weights, and
it binds the site to nothing: the site's own policy decides again, at the site, for every packet.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime

from allograft.crypto import canonical
from allograft.crypto.keys import SigningKey
from allograft.errors import RejectedError
from allograft.routing import document

CARD_TYPE = "urn:allograft:card:v1"
ANY_DONOR = "*"
_MODELS = 256


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a model, as far as routing compares it."""

    family: str
    hidden: int
    layers: int
    vocab: int

    def to_json(self) -> dict[str, canonical.Json]:
        """The shape as a JSON object."""
        return {
            "family": self.family,
            "hidden": self.hidden,
            "layers": self.layers,
            "vocab": self.vocab,
        }

    @classmethod
    def from_json(cls, value: canonical.Json) -> Architecture:
        """Read a shape.

        Raises:
            RejectedError: AG-IN-003 or AG-RTE-001.
        """
        fields = canonical.as_object(value, {"family", "hidden", "layers", "vocab"})
        return cls(
            family=document.read_line(fields["family"]),
            hidden=canonical.as_int(fields["hidden"]),
            layers=canonical.as_int(fields["layers"]),
            vocab=canonical.as_int(fields["vocab"]),
        )


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model of a site, described without its weights.

    Attributes:
        name: The site's own name for it.
        weights_digest: SHA-256 (hex) of the weights, as `provenance` defines it.
        tokenizer_digest: SHA-256 (hex) of the tokenizer's definition.
    """

    name: str
    weights_digest: str
    architecture: Architecture
    tokenizer_digest: str


@dataclass(frozen=True, slots=True)
class Accepts:
    """Which offers a site wants to hear of; an empty list accepts nothing.

    Attributes:
        kinds: Packet kinds, such as ``organ``.
        donors: Site names, or ``*`` for any site of the roster.
        modes: Privacy modes, such as ``open``.
    """

    kinds: tuple[str, ...]
    donors: tuple[str, ...]
    modes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """A site's description of itself.

    Attributes:
        version: Grows with every card of the site; the coordinator keeps the highest.
    """

    site: str
    models: tuple[ModelFacts, ...]
    accepts: Accepts
    version: int
    time: datetime

    def to_json(self) -> dict[str, canonical.Json]:
        """The card as a predicate."""
        return {
            "site": self.site,
            "models": [
                {
                    "name": model.name,
                    "weights_digest": model.weights_digest,
                    "architecture": model.architecture.to_json(),
                    "tokenizer_digest": model.tokenizer_digest,
                }
                for model in self.models
            ],
            "accepts": {
                "kinds": list(self.accepts.kinds),
                "donors": list(self.accepts.donors),
                "modes": list(self.accepts.modes),
            },
            "version": self.version,
            "time": canonical.format_time(self.time),
        }


def sign_card(card: Card, key: SigningKey) -> bytes:
    """Sign a card; its subject is the site, by the digest of its name."""
    subject = hashlib.sha256(card.site.encode()).hexdigest()
    statement = document.Statement(CARD_TYPE, card.site, subject, card.to_json())
    return document.sign_statement(statement, key)


def verify_card(envelope: bytes, roster: document.Signers, now: datetime) -> Card:
    """Verify a card against the keys of the site it names.

    Raises:
        RejectedError: AG-RTE-001 malformed, AG-SIG-* signature, or the roster's refusal.
    """
    statement = document.verify_statement(envelope, CARD_TYPE, ("site", "site"), roster, now)
    try:
        return _read_card(statement)
    except RejectedError as error:
        raise RejectedError("AG-RTE-001", f"card: {error.cause}") from error


def _read_card(statement: document.Statement) -> Card:
    fields = canonical.as_object(
        statement.predicate, {"site", "models", "accepts", "version", "time"}
    )
    accepts = canonical.as_object(fields["accepts"], {"kinds", "donors", "modes"})
    models = canonical.as_list(fields["models"])
    if len(models) > _MODELS:
        raise RejectedError("AG-RTE-001", f"{len(models)} models")
    return Card(
        site=document.read_site(fields["site"]),
        models=tuple(_read_model(model) for model in models),
        accepts=Accepts(
            kinds=document.read_lines(accepts["kinds"]),
            donors=document.read_lines(accepts["donors"]),
            modes=document.read_lines(accepts["modes"]),
        ),
        version=canonical.as_int(fields["version"]),
        time=document.read_time(fields["time"]),
    )


def _read_model(value: canonical.Json) -> ModelFacts:
    fields = canonical.as_object(
        value, {"name", "weights_digest", "architecture", "tokenizer_digest"}
    )
    return ModelFacts(
        name=document.read_line(fields["name"]),
        weights_digest=document.read_sha256(fields["weights_digest"]),
        architecture=Architecture.from_json(fields["architecture"]),
        tokenizer_digest=document.read_sha256(fields["tokenizer_digest"]),
    )
