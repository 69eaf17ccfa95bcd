# SPDX-License-Identifier: Apache-2.0
"""The site's card: digests of its models and what its policy would consider.

Invariant: a new card leaves exactly when what it says changed; without a policy it says that the
site accepts nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime

from allograft.crypto import canonical
from allograft.errors import RejectedError
from allograft.privacy.scan import check_strings
from allograft.routing.card import Accepts, Architecture, Card, ModelFacts, sign_card
from allograft_client.site import Site, model_base

_DIGEST, _VERSION = "card-digest", "card-version"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def describe_site(site: Site) -> Card:
    """The card as it should be now, without version and time."""
    models = []
    for model in site.store.models():
        base = model_base(model)
        architecture = Architecture(
            base.architecture.family,
            base.architecture.hidden,
            base.architecture.layers,
            base.architecture.vocab,
        )
        models.append(
            ModelFacts(model.name, base.weights_digest, architecture, base.tokenizer_digest)
        )
    return Card(site.name, tuple(models), _accepts(site), 0, _EPOCH)


def publish_card(site: Site) -> bool:
    """Send a card if it says something new.

    Raises:
        RejectedError: AG-PRV-021 if a model's name looks like an identifier of a person; as
            `Site.matchers` for the identifier list.
        UnavailableError: AG-STO-001 when the disk is full, AG-STO-005 as `Site.matchers`.
    """
    card = describe_site(site)
    digest = hashlib.sha256(canonical.dumps(card.to_json())).hexdigest()
    if site.store.setting(_DIGEST) == digest:
        return False
    check_strings(card.to_json(), "card", site.matchers)
    version = int(site.store.setting(_VERSION, "0")) + 1
    signed = sign_card(replace(card, version=version, time=site.now()), site.key)
    with site.store.transaction():
        site.store.set_setting(_DIGEST, digest)
        site.store.set_setting(_VERSION, str(version))
        site.outbox.add("card", {"card.json": signed})
    return True


def _accepts(site: Site) -> Accepts:
    try:
        rules = site.policy().receive
    except RejectedError:
        return Accepts((), (), ())
    return Accepts(rules.kinds, rules.donors, rules.modes)
