import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from visalign.demos.files import (
    decode_upload,
    read_picture,
    run_folder,
    run_names,
    sample_files,
    save_comparison,
    side_by_side,
    to_download,
)
from visalign.demos.settings import MAX_UPLOAD, Settings


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_uploads_come_as_upright_rgb_on_white(tmp_path):
    clear = decode_upload(saved(tmp_path / "clear.png", Image.new("RGBA", (4, 4), (255, 0, 0, 0))))
    assert clear.mode == "RGB" and clear.getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert decode_upload(saved(tmp_path / "lying.jpg", Image.new("RGB", (8, 4)), exif=exif)).size == (4, 8)
    assert decode_upload(saved(tmp_path / "grey.webp", Image.new("L", (4, 4), 128))).mode == "RGB"


def huge_png() -> bytes:
    """A PNG that says it has 60000 x 60000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("text.png", b"not a picture at all", "text.png: is no picture of PNG, JPEG, WEBP"),
        ("empty.png", b"", "empty.png: is no picture of PNG"),
        (
            "page.svg",
            b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
            "is no picture of PNG",
        ),
        ("bomb.png", huge_png(), "bomb.png: got (60000 x 60000|more) pixels"),
        ("big.png", b"\0" * (MAX_UPLOAD + 1), "big.png: got 10,485,761 bytes"),
    ],
)
def test_what_is_no_usable_picture_is_refused_in_a_sentence(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        decode_upload(tmp_path / name)


def test_a_picture_cut_short_or_of_another_format_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, format="PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(ValueError, match="cut.png: is broken"):
        decode_upload(tmp_path / "cut.png")
    with pytest.raises(ValueError, match="is no picture of PNG, JPEG, WEBP"):
        decode_upload(saved(tmp_path / "other.tiff", Image.new("RGB", (4, 4))))


def make_run(root, name, lines=('{"step": 1}',)):
    (root / name / "samples").mkdir(parents=True)
    (root / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return root / name


def test_only_run_folders_inside_the_root_can_be_named(tmp_path):
    root, outside = tmp_path / "runs", tmp_path / "secret"
    make_run(root, "one"), make_run(tmp_path, "secret"), (root / "no_run").mkdir()
    (root / "link").symlink_to(outside)
    assert run_names(root) == ["one"] and run_names(tmp_path / "none") == []
    assert run_folder(root, "one") == root / "one"
    for name in ("../secret", "one/../../secret", str(outside), "link", "no_run", "", ".", "one/"):
        with pytest.raises(ValueError, match="expected one of the runs"):
            run_folder(root, name)


def test_samples_come_in_the_order_of_steps_and_links_out_are_left_out(tmp_path):
    run = make_run(tmp_path, "run")
    for name in ("after", "step-10", "step-2", "before"):
        saved(run / "samples" / f"{name}.png", Image.new("RGB", (4000, 10)))
    saved(tmp_path / "private.png", Image.new("RGB", (4, 4)))
    (run / "samples" / "step-3.png").symlink_to(tmp_path / "private.png")
    assert [p.stem for p in sample_files(run)] == ["before", "step-2", "step-10", "after"]
    assert read_picture(run / "samples" / "before.png").width == 1600
    (run / "samples" / "step-2.png").write_bytes(b"half")
    with pytest.raises(ValueError, match="step-2.png: cannot be read just now"):
        read_picture(run / "samples" / "step-2.png")


def test_a_saved_comparison_carries_its_prompt_seeds_and_settings(tmp_path):
    left, right = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")], [Image.new("RGB", (64, 64), "lime")] * 2
    facts = {"prompt": "ein Käfer <b>", "seeds": [3, 4], "steps": 10, "left": {"variant": "base"}, "right": {}}
    sheet, notes, *pictures = save_comparison(tmp_path, left, right, facts)
    assert json.loads(notes.read_text()) == facts and len(pictures) == 4
    image = Image.open(sheet)
    assert image.text["prompt"] == facts["prompt"] and json.loads(image.text["visalign"]) == facts
    assert image.size == (520, 520) and image.getpixel((10, 300)) == (0, 0, 255)
    one = Image.open(sheet.parent / "left-seed4.png")
    assert one.text["seed"] == "4" and json.loads(one.text["visalign"])["made_by"] == {"variant": "base"}
    assert list(one.getdata()) == list(left[1].getdata())
    assert save_comparison(tmp_path, left, right, facts)[0].parent != sheet.parent
    assert side_by_side([Image.new("RGB", (512, 300))], []).size == (1032, 300)


def test_downloads_are_copies_under_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(), (tmp_path / "file.txt").write_text("x")
    first, second = to_download(tmp_path / "file.txt"), to_download(tmp_path / "file.txt")
    assert first != second and first.startswith(str(tmp_path / "cache")) and first.endswith("/file.txt")


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(host="0.0.0.0"), "user: got none with --host 0.0.0.0, expected --user, and a password"),
        (dict(share=True), "user: got none with --share"),
        (dict(user="me"), "user: got a user or a password without the other"),
        (dict(port=70000), "port: got 70000"),
    ],
)
def test_the_workbench_is_not_opened_to_others_without_a_password(given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**given)


def test_settings_with_a_password_may_be_open_and_do_not_show_it():
    open_to_all = Settings(host="0.0.0.0", user="me", password="secret")
    assert "secret" not in repr(open_to_all)
    assert Settings(host="localhost").reward_specs[0] == "clip_match" and Settings().judge_name == "shapes-vlm"
    assert Settings(model="owner/name").judge_name is None


def test_the_script_is_the_command():
    script = Path(__file__).parents[2] / "demos" / "app.py"
    done = subprocess.run([sys.executable, script, "--host", "0.0.0.0"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("demo: user: got none with --host 0.0.0.0")


def test_a_model_of_videos_is_refused_as_it_is_loaded(tmp_path):
    from tiny_pipelines import wan

    from visalign.demos.model_session import ModelSession

    wan().save_pretrained(tmp_path / "wan")
    with pytest.raises(ValueError, match="model: got .*wan', which draws videos, expected one that draws pictures"):
        ModelSession(Settings(model=str(tmp_path / "wan")))
