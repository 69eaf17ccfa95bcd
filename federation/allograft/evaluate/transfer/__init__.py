# SPDX-License-Identifier: Apache-2.0
"""The referee: recipes on recipients at doses, beside the controls that could sink them.

- `text`: documents split and stripped of near-duplicates, and what overlap is left (no tensors).
- `plan`: sizes, arms and seeds as data (no tensors).
- `world`: the reference models: two lineages, a relative, another width, another tokenizer.
- `ngram`: what counting alone gets out of the donor's text (numpy only).
- `bench`: what every measurement shares: models, held-out text, training at the donor.
- `arms`: one function per arm: recipes, oracle, controls, baselines, the papers' own settings.
- `store`, `run`: finished cells as durable files; a run goes on where it stopped.
- `figures`: gain, recovery, harm, the sanity rule (numpy only).
- `table`, `plot`: the same figures as Markdown and as SVG.

Invariant: nothing is chosen on test documents. Rates, doses, mixture weights and positions are
chosen on validation documents, and every figure in a table comes from documents no choice has seen.
"""
