# SPDX-License-Identifier: Apache-2.0
"""The demo's text and the world it builds from it."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from allograft.cli import shell
from allograft.cli.demo import base as demo_base, text as demo_text
from allograft.cli.demo.base import WorldOptions, check_own_files, make_world
from allograft.cli.demo.processes import reporting
from allograft.cli.main import app
from allograft.errors import RejectedError, UnavailableError
from allograft.privacy.scan import scan_texts
from allograft.recipes.blocks import describe_model
from allograft.recipes.documents import drop_near_duplicates, read_documents
from allograft.recipes.shape import train_tokenizer
from allograft.recipes.snapshot import load_model, load_tokenizer, state_digest

QUICK = WorldOptions(
    base_steps=2,
    descendant_steps=1,
    stranger_steps=1,
    donor_notes=120,
    own_notes=80,
    retention_documents=70,
)


def quiet(_what: str, _fraction: float) -> None:
    pass


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


class TestText:
    """General text and notes."""

    def test_general_text_is_the_same_every_time_and_held_out_by_source(self) -> None:
        text = demo_text.read_python_text()
        assert demo_text.read_python_text() == text
        training = " ".join(" ".join(chunk.split()) for chunk in text.training)
        for chunk in text.retention:
            for paragraph in chunk.split("\n\n"):
                plain = " ".join(paragraph.split())
                assert len(plain) < 60 or plain not in training
        assert sum(map(len, text.training)) > 500_000
        assert len(text.retention) >= 60
        assert all(200 <= len(chunk) <= 1800 for chunk in text.training)

    def test_a_python_without_documentation_is_told_so(self, monkeypatch) -> None:
        monkeypatch.setattr(demo_text, "_topics", lambda: iter(()))
        monkeypatch.setattr(demo_text, "_docstrings", lambda: iter(()))
        with pytest.raises(RejectedError) as error:
            demo_text.read_python_text()
        assert error.value.code == "AG-DEM-010"

    def test_notes_are_the_same_for_a_seed_and_of_other_patients_for_another(self) -> None:
        medicine = demo_text.invent_medicine()
        notes = demo_text.write_notes(medicine, 500, 1)
        assert demo_text.write_notes(medicine, 500, 1) == notes
        assert len(notes) == 500
        other = {note.text for note in demo_text.write_notes(medicine, 500, 2)}
        assert not other & {note.text for note in notes}

    def test_several_thousand_notes_hold_nothing_that_looks_like_a_person(self) -> None:
        notes = demo_text.write_notes(demo_text.invent_medicine(), 4000, 3)
        assert scan_texts((note.text for note in notes), dates=True) == {}

    def test_every_patient_has_a_number_that_no_other_s_record_names(self) -> None:
        notes = demo_text.write_notes(demo_text.invent_medicine(), 400, 5)
        records = demo_text.write_records(notes, 6)
        assert demo_text.write_records(notes, 6) == records
        numbers = {record.person: record.number for record in records}
        assert len(set(numbers.values())) == len(numbers) == len({note.patient for note in notes})
        for person, number in numbers.items():
            named = {record.person for record in records if number in record.text}
            assert named == {person}

    def test_notes_are_not_near_duplicates(self, tmp_path: Path) -> None:
        demo_text.save_notes(
            tmp_path / "n.jsonl", demo_text.write_notes(demo_text.invent_medicine(), 1000, 4)
        )
        documents = read_documents(tmp_path / "n.jsonl")
        assert len(documents) == 1000
        assert len(drop_near_duplicates(documents)) > 950

    def test_a_condition_always_means_the_same_drug_test_and_interval(self) -> None:
        medicine = demo_text.invent_medicine()
        by_name = {condition.name: condition for condition in medicine}
        assert len(by_name) == len(medicine) == 24
        assert len({condition.drug for condition in medicine}) == 24
        named = re.compile("|".join(map(re.escape, by_name)))
        severity = {"mild": 0, "moderate": 1, "severe": 2}
        for note in demo_text.write_notes(medicine, 800, 5):
            condition = by_name[named.search(note.text)[0]]
            level = severity[re.search(r"(mild|moderate|severe) " + condition.name, note.text)[1]]
            assert condition.drug in note.text
            assert condition.test in note.text
            assert condition.interval in note.text
            assert f"{condition.doses_mg[level]} mg" in note.text
            assert (condition.procedure in note.text) == (level == 2)


class TestTokenizer:
    """The byte-level tokenizer."""

    def test_writes_any_text_and_reads_it_back(self) -> None:
        tokenizer = train_tokenizer(demo_text.read_python_text().training[:100], 512)
        assert tokenizer.get_vocab_size() == 512
        for content in ("def f(x): return x", "Größe 23 µg — ✓", "\x00\t\n"):
            assert tokenizer.decode(tokenizer.encode(content).ids) == content


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> demo_base.World:
    return make_world(tmp_path_factory.mktemp("world"), QUICK, quiet)


class TestWorld:
    """What the sites start with."""

    def test_three_models_of_one_shape_and_tokenizer(self, world) -> None:
        models = [load_model(path) for path in (world.base, world.descendant, world.stranger)]
        assert len({describe_model(model.config) for model in models}) == 1
        assert len({state_digest(model) for model in models}) == 3
        assert 900_000 < models[0].num_parameters() < 1_500_000
        ids = [load_tokenizer(p).encode("a visit") for p in (world.base, world.stranger)]
        assert ids[0] == ids[1]

    def test_the_descendant_is_a_relative_and_the_stranger_is_not(self, world) -> None:
        base, descendant, stranger = (
            load_model(path).model.layers[2].mlp.up_proj.weight.detach().flatten()
            for path in (world.base, world.descendant, world.stranger)
        )
        assert float(base @ descendant / base.norm() / descendant.norm()) > 0.9
        assert abs(float(base @ stranger / base.norm() / stranger.norm())) < 0.1

    def test_no_site_s_text_is_another_s(self, world) -> None:
        donor = set(texts_of(world.donor_data))
        own = [world.same_files, world.descendant_files, world.stranger_files]
        for number, files in enumerate(own):
            texts = set(texts_of(files.domain))
            assert len(texts) == 80
            assert not texts & donor
            assert not set(texts_of(files.retention)) & donor
            for other in own[number + 1 :]:
                assert not texts & set(texts_of(other.domain))

    def test_the_donor_trains_on_some_general_text_too(self, world) -> None:
        donor = set(texts_of(world.donor_data))
        general = set(texts_of(world.base.parent / "general.jsonl"))
        assert 0.1 < len(donor & general) / len(donor) < 0.3
        assert world.nature == "synthetic"

    def test_a_person_s_own_base_and_text_are_used(self, world, tmp_path: Path) -> None:
        notes = demo_text.write_notes(demo_text.invent_medicine(), 420, 8)
        data, general = tmp_path / "data.jsonl", tmp_path / "general.txt"
        demo_text.save_notes(data, notes)
        general.write_text("\n\n".join(f"Paragraph {n} on weather." for n in range(400)), "utf-8")
        options = WorldOptions(
            base=world.base, data=data, general=general, descendant_steps=1, replay=0.0
        )
        own = make_world(tmp_path / "world", options, quiet)
        assert own.base == world.base
        assert own.nature == ""
        assert set(texts_of(own.donor_data)) < {note.text for note in notes}
        assert set(texts_of(own.donor_retention)) < {
            f"Paragraph {n} on weather." for n in range(400)
        }
        assert state_digest(load_model(own.stranger)) != state_digest(load_model(own.base))

    @pytest.mark.parametrize(
        ("field", "content", "code"),
        [
            ("data", b"", "AG-RCP-030"),
            ("data", b"\xff\xfe\x00", "AG-RCP-031"),
            ("data", b"one\n\ntwo\n\nthree", "AG-DEM-010"),
            ("general", b"one\n\ntwo\n\nthree", "AG-DEM-010"),
        ],
    )
    def test_unusable_text_is_refused(
        self, tmp_path: Path, field: str, content: bytes, code: str
    ) -> None:
        path = tmp_path / "file.txt"
        path.write_bytes(content)
        with pytest.raises(RejectedError) as error:
            make_world(tmp_path / "world", WorldOptions(**{field: path}), quiet)
        assert error.value.code == code

    @pytest.mark.parametrize(
        ("option", "code"),
        [("--base", "AG-DEM-011"), ("--data", "AG-DEM-010"), ("--general", "AG-DEM-010")],
    )
    def test_a_missing_file_is_refused_before_a_consortium_is_founded(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, code: str
    ) -> None:
        missing, keep = tmp_path / "missing", tmp_path / "keep"
        status = shell.invoke(app, "allograft", ["demo", option, str(missing), "--keep", str(keep)])
        err = capsys.readouterr().err
        assert (status, code in err, str(missing) in err) == (1, True, True)
        assert not keep.exists()

    def test_too_little_text_is_refused_before_a_consortium_is_founded(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "few.txt").write_text("one\n\ntwo\n\nthree", "utf-8")
        with pytest.raises(RejectedError, match="AG-DEM-010"):
            check_own_files(WorldOptions(data=tmp_path / "few.txt"))

    def test_an_unusable_base_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RejectedError) as error:
            make_world(tmp_path / "world", WorldOptions(base=tmp_path), quiet)
        assert error.value.code == "AG-DEM-011"

    @pytest.mark.parametrize(
        ("program", "kind", "code"),
        [
            ("import sys; sys.exit(7)", UnavailableError, "AG-DEM-012"),
            (
                'print(\'{"error": {"code": "AG-RCP-020", "cause": "x"}}\'); raise SystemExit(1)',
                RejectedError,
                "AG-RCP-020",
            ),
        ],
    )
    def test_a_failed_training_process_is_reported_and_gone(
        self, tmp_path: Path, program: str, kind: type[Exception], code: str
    ) -> None:
        maker = demo_base._Maker(tmp_path, QUICK, quiet)
        with (
            pytest.raises(kind) as error,
            reporting([sys.executable, "-c", program], tmp_path / "log") as child,
        ):
            maker._finish(("model",), child)
        assert error.value.code == code
        assert child.process.returncode is not None

    def test_a_base_that_cannot_be_loaded_is_refused_with_its_code(
        self, world: demo_base.World, tmp_path: Path
    ) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(world.base, broken)
        (broken / "model.safetensors").write_bytes(b"\x00" * 64)
        options = replace(QUICK, base=broken)
        with pytest.raises(RejectedError) as error:
            make_world(tmp_path / "world", options, quiet)
        assert error.value.code == "AG-RCP-032"
