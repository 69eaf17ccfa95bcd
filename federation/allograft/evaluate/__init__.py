# SPDX-License-Identifier: Apache-2.0
"""How a recipient finds out, on its own data, whether a packet helps.

- `bootstrap`: paired bootstrap over documents (numpy only).
- `gate`: from measurements to keep or revert, as a pure function (numpy only).
- `screen`: from figures of weights and behaviour to PASS, ALARM or INVALID (pure).
- `spectrum`, `behaviour`: measure those figures on a packet and on the composed model.
- `loss`: held-out loss per document, the only measurement the gate needs.
- `trial`: attaches at each dose, measures, detaches bit-exactly, and reports.
- `report`: the trial's typed report and its JSON form.
- `transfer`: every recipe on every kind of recipient, beside controls (`allograft evaluate`).
"""
