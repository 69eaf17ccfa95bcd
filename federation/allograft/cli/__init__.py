# SPDX-License-Identifier: Apache-2.0
"""`allograft`, the tool that needs no daemon: packets, roster, audit, demo; and the shell."""
