# SPDX-License-Identifier: Apache-2.0
"""All cryptography of Allograft, on kept libraries only; nothing else imports `cryptography`.

- `canonical`: RFC 8785 JSON for what we create, strict reading of what we receive.
- `keys`: the five keys of a site, one purpose each, and their files.
- `dsse`: signed envelopes.
- `notekey`: Ed25519 as the signed-note format uses it, with point checks.
- `seal`: Cobblestone streams and HPKE X-Wing key wraps.
"""
