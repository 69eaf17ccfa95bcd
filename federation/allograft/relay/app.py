# SPDX-License-Identifier: Apache-2.0
"""The identity of the one Flower app that sites run their courier for.

Flower ships apps as bundles and executes them at the sites. Ours holds no code, and a site's
executor compares the digest of whatever arrives with this constant before it does anything else.
The bundle is made from `server/flower/pyproject.toml`; a test rebuilds it.
"""

COURIER_APP_SHA256 = "2773ac4744b870dd41dfb33d1a871f14a2dea9946d03b7f24fd0d2a12d48c4e6"

#: The three message types, one for each method of a frame.
MESSAGE_TYPES = {"poll": "query.poll", "take": "query.take", "put": "query.put"}

#: Where a frame lies in a message, under RECORD. Up to SMALL_BYTES in all: a ConfigRecord of two
#: byte fields. Above: an ArrayRecord of two one-dimensional uint8 arrays of stype STYPE. The body
#: may be empty.
RECORD = "frame"
ENVELOPE = "envelope"
BODY = "body"
STYPE = "opaque"
SMALL_BYTES = 256 << 10
