# SPDX-License-Identifier: Apache-2.0
"""Coordinator side: roster front, routing, mailbox, log, and its courier."""
