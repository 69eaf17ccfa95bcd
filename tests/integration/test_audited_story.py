# SPDX-License-Identifier: Apache-2.0
"""A packet's whole way through a real coordinator, and an auditor who believes none of it."""

from allograft.log.audit import audit_folder
from allograft.log.export import export_log, is_witnessed
from kit.coordination import Coordination


def test_the_log_of_a_real_coordinator_passes_an_offline_audit(tmp_path):
    world = Coordination(tmp_path, "donor", "near", "far")
    for name in ("near", "far"):
        assert world.judged(world.card(name))[0] == "stored"
    offer = world.make_offer("donor")
    assert world.judged(world.offer(offer)) == ("stored", "")
    dispatch_id, files = world.make_dispatch(offer, "near", "far")
    assert world.judged(world.send("donor", "dispatch", files)) == ("stored", "")
    world.run(lambda: set(world.deliveries(dispatch_id).values()) == {"delivered"})
    item = world.receipt("near", offer.packet_id, dispatch_id, files["dispatch.json"])
    assert world.judged(item) == ("stored", "")
    world.restart()
    assert world.judged(world.withdrawal(offer)) == ("stored", "")
    world.run(lambda: is_witnessed(world.coordinator.log))

    export_log(world.coordinator.log, tmp_path / "export")
    audited = audit_folder(tmp_path / "export", world.keeper.fingerprint)
    story = [event.event for event in audited.events if event.event != "roster"]
    assert story == ["offer", "route", "dispatch", "receipt", "withdrawal"]
    assert audited.missing_documents == 0
    assert len(audited.cosignatures) >= audited.quorum == 2
    world.coordinator.close()
