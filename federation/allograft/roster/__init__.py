# SPDX-License-Identifier: Apache-2.0
"""Who belongs to the consortium, as a TUF repository whose root keys stay offline.

- `records`: what the roster says about a site, the coordinator and the witnesses.
- `enrolment`: a party's request, with proof that it holds the keys it names.
- `keeper`: the offline administrator: init, enrol, revoke, publish.
- `timestamp`: the coordinator's one right, to say that a roster is still the newest.
- `bundle`, `invitation`: a roster as one file; what a new site needs to begin.
- `client`: the only way to a trusted `Roster`.
"""
