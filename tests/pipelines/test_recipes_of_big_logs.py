"""Recipes of large public logs, from a few hand-made rows in the exact format of their authors' files."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import manifest as manifests
from pipelines.convert.options import Options
from pipelines.recipes import ali_ccp, kuairand, qk_video, tiktok
from pipelines.recipes.catalogue import RECIPES
from pipelines.recipes.lookup import Lookup
from pipelines.recipes.recipe import Made, make
from pipelines.recipes.statistics import Compared, compare
from stem_util.errors import UserError


def made(name: str, raw: Path, output: Path, **settings: object) -> Made:
    defaults = {setting.name: setting.default for setting in RECIPES[name].settings}
    return make(RECIPES[name], str(raw), str(output), {**defaults, **settings})


def raw_rows(output: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(output / "raw" / split).sort_by("row_id").to_pylist()


def refused(name: str, raw: Path, output: Path) -> str:
    with pytest.raises(UserError) as error:
        made(name, raw, output)
    assert (
        not output.exists()
        and RECIPES[name].get in str(error.value)
        and "--" not in str(error.value).replace("--raw", "")
    )
    return str(error.value).replace(f"{raw}/", "")


# TikTok: 12 integers with tabs between them, no header; unknown cities and sounds are -1.


def tiktok_line(row: int, **changed: object) -> str:
    values = dict.fromkeys(tiktok.COLUMNS, 100 + row) | {"uid": row % 7, "user_city": -1, "item_city": -1}
    values |= {"channel": 0, "finish": int(row % 3 == 0), "like": int(row % 9 == 0), "video_duration": 9 + row % 3}
    return "\t".join(str(value) for value in (values | changed).values()) + "\n"


def tiktok_log(directory: Path, lines: list[str]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "final_track1_train.txt").write_text("".join(lines))
    return directory


def test_tiktok_is_divided_as_the_authors_divide_it(tmp_path: Path) -> None:
    done = made("tiktok", tiktok_log(tmp_path / "raw", [tiktok_line(row) for row in range(2000)]), tmp_path / "data")
    sizes = [done.manifest.rows(split) for split in manifests.SPLITS]
    assert sum(sizes) == 2000
    assert sizes == pytest.approx([1620, 180, 200], rel=0.15)
    for row in raw_rows(tmp_path / "data", "test"):
        values = tiktok_line(row.pop("row_id")).split()
        assert row == dict(zip(tiktok.COLUMNS, map(int, values), strict=True))
    found = {statistic.name: statistic.found for statistic in done.statistics}
    assert found["frequent users"] == 7 and found["frequent items"] == 0
    assert found["fields"] == 8 and found["finish rate"] == pytest.approx(667 / 2000)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t2\t3\n", "final_track1_train.txt, line 3: should have 12 values (uid, user_city, item_id, ...): "),
        (tiktok_line(0).replace("\t", ","), "final_track1_train.txt, line 3: should have 12 values"),
        (tiktok_line(0, like=2), "final_track1_train.txt, line 3: like is '2', not 0 or 1"),
        (tiktok_line(0, finish=""), "final_track1_train.txt, line 3: finish is '', not 0 or 1"),
        (tiktok_line(0, uid=""), "final_track1_train.txt, line 3: uid is '', no integer"),
        (tiktok_line(0, music_id="x"), "final_track1_train.txt, line 3: music_id is 'x', no integer"),
    ],
)
def test_a_damaged_line_of_tiktok_is_named(line: str, message: str, tmp_path: Path) -> None:
    raw = tiktok_log(tmp_path / "raw", [tiktok_line(0), tiktok_line(1), line, tiktok_line(2)])
    assert message in refused("tiktok", raw, tmp_path / "data")


def test_files_of_other_line_ends_or_without_rows(tmp_path: Path) -> None:
    raw = tiktok_log(tmp_path / "raw", [tiktok_line(row) for row in range(300)])
    path = raw / "final_track1_train.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    done = made("tiktok", raw, tmp_path / "data")
    assert sum(done.manifest.rows(split) for split in manifests.SPLITS) == 300
    path.write_bytes(b"\x1f\x8b" + path.read_bytes())
    assert "final_track1_train.txt: is packed with gzip: the file is cut" in refused("tiktok", raw, tmp_path / "other")
    path.write_bytes(b"\n")
    assert "final_track1_train.txt holds no rows: the file is cut" in refused("tiktok", raw, tmp_path / "other")


# QK-Video: CSV with a header; users stand together, a missing category is \\N.


def qk_log(directory: Path, rows: list[dict[str, object]]) -> Path:
    directory.mkdir(exist_ok=True)
    lines = [",".join(qk_video.COLUMNS), *(",".join(str(row[name]) for name in qk_video.COLUMNS) for row in rows)]
    (directory / "ctr_data_1M.csv").write_text("\n".join(lines) + "\n")
    return directory


def qk_rows(users: list[int]) -> list[dict[str, object]]:
    """Rows of these users, whose items count up."""
    rows = []
    for item, user in enumerate(users):
        row: dict[str, object] = dict.fromkeys(qk_video.COLUMNS, 0)
        row |= {"user_id": user, "item_id": item}
        row |= {"click": item % 2, "like": int(item % 4 == 1), "gender": 1, "age": 3, "watching_times": item % 2}
        rows.append(row | {"video_category": "\\N" if item % 5 == 0 else 1, "hist_1": 77})
    return rows


def parts(users: list[int]) -> dict[str, list[int]]:
    """Items by split, one row after another: the first floor(.8 n) rows of a user's n are train, and so on."""
    found: dict[str, list[int]] = {split: [] for split in manifests.SPLITS}
    for item, user in enumerate(users):
        place, rows = users[:item].count(user), users.count(user)
        found["train" if place < rows * 8 // 10 else "validation" if place < rows * 9 // 10 else "test"].append(item)
    return found


@pytest.mark.parametrize("users", [[5] * 20 + [2] * 7 + [9] * 3 + [1], [3, 1, 3, 8, 1, 3] * 6])
def test_qk_video_divides_the_rows_of_each_user_in_their_order(users: list[int], tmp_path: Path) -> None:
    done = made("qk_video", qk_log(tmp_path / "raw", qk_rows(users)), tmp_path / "data")
    expected = parts(users)
    assert [done.manifest.rows(split) for split in manifests.SPLITS] == [len(items) for items in expected.values()]
    for split in ("validation", "test"):
        rows = raw_rows(tmp_path / "data", split)
        assert [row["item_id"] for row in rows] == expected[split]
        assert [row["video_category"] for row in rows] == [None if item % 5 == 0 else 1 for item in expected[split]]
    found = {statistic.name: statistic.found for statistic in done.statistics}
    assert found["fields"] == 16 and found["click rate"] == pytest.approx(len(users) // 2 / len(users))


def test_qk_video_is_divided_over_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.log.source.CHUNK_ROWS", 7)
    users = [4] * 25 + [6] * 25
    done = made("qk_video", qk_log(tmp_path / "raw", qk_rows(users)), tmp_path / "data", fields="15")
    assert [row["item_id"] for row in raw_rows(tmp_path / "data", "test")] == parts(users)["test"]
    assert "watching_times" not in [feature.name for feature in done.manifest.schema.features]


@pytest.mark.parametrize(
    ("replaced", "by", "message"),
    [
        (
            "like",
            "liked",
            "ctr_data_1M.csv: its first line names no column like (user_id, item_id, click,",
        ),
        ("\n5,1,1", "\n5,1,7", "ctr_data_1M.csv, line 3: click is '7', not 0 or 1"),
        ("\n5,1,1", "\n,1,1", "ctr_data_1M.csv, line 3: user_id is '', no integer"),
        ("\n5,1,1", "\n-5,1,1", "ctr_data_1M.csv: users -5 to 5 are not Tenrec's"),
        ("\n5,1,1", "\n5000000000,1,1", "ctr_data_1M.csv: users 5 to 5000000000 are not Tenrec's"),
        ("\n", ",x\n", "ctr_data_1M.csv, line 2: should have 21 values (user_id, item_id, click, ...)"),
        ("\n5,1,1", "\n5,1", "ctr_data_1M.csv, line 3: should have 20 values (user_id, item_id, click, ...)"),
    ],
)
def test_another_or_a_damaged_file_of_qk_video_is_named(replaced: str, by: str, message: str, tmp_path: Path) -> None:
    raw = qk_log(tmp_path / "raw", qk_rows([5] * 20))
    path = raw / "ctr_data_1M.csv"
    path.write_text(path.read_text().replace(replaced, by, 1))
    assert message in refused("qk_video", raw, tmp_path / "data")


# KuaiRand: CSV files with headers; tags are quoted where there are several, whole numbers may be written as floats.

USER_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{number}" for number in range(18))
)
VIDEO_HEADER = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag"
)


def kuairand_files(directory: Path, name: str) -> Path:
    """Three users, four videos, and 62 rows: two on each of the 31 days."""
    directory.mkdir(exist_ok=True)
    size, logs = name.removeprefix("kuairand_"), [file.name for file in RECIPES[name].files[:-2]]
    users = [USER_HEADER]
    for user in (2, 0, 1):
        encrypted = ",".join(["1", "2", "17", "638", "" if user else "4.0", *"0012312", *[""] * 6])
        users.append(f'{user},full_active,0,-124,0,5,"(0,10]",4,"[1,10)",0,0,{107 + user},61-90,' + encrypted)
    videos = [VIDEO_HEADER]
    for video in range(4):
        tag = ('"12,65"', "39", "", "8")[video]
        videos.append(
            f"{10 * video},{900 + video},NORMAL,2022-04-05,ShortImport,1.0,,720,1280,3{video}15836533.0,"
            f"{'' if video == 2 else '9.0'},{tag}"
        )
    (directory / f"user_features_{size}.csv").write_text("\n".join(users) + "\n")
    (directory / f"video_features_basic_{size}.csv").write_text("\n".join(videos) + "\n")
    lines: dict[str, list[str]] = {log: [",".join(kuairand.LOG)] for log in logs}
    for row in range(62):
        day = 20220408 + row // 2 if row < 46 else 20220501 + (row - 46) // 2
        half = logs[: len(logs) // 2] if day < 20220422 else logs[len(logs) // 2 :]
        labels = ",".join(str(int(row % 8 == task)) for task in range(7))
        lines[half[row % len(half)]].append(
            f"{row % 3},{row % 4 * 10},{day},{row % 24 * 100},{1649347200000 + row},{labels},"
            f"{row * 100},{row * 1000},0,0,{int(row % 8 == 7)},0,{row % 15}"
        )
    for log, text in lines.items():
        (directory / log).write_text("\n".join(text) + "\n")
    return directory


@pytest.mark.parametrize("name", ["kuairand_1k", "kuairand_pure", "kuairand_27k"])
def test_kuairand_joins_users_and_videos_and_tests_on_the_last_day(name: str, tmp_path: Path) -> None:
    done = made(name, kuairand_files(tmp_path / "raw", name), tmp_path / "data")
    assert done.manifest.name == name
    assert [done.manifest.rows(split) for split in manifests.SPLITS] == [58, 2, 2]
    rows = sorted(raw_rows(tmp_path / "data", "test"), key=lambda row: row["time_ms"])
    assert [row["date"] for row in rows] == [20220508] * 2
    last = rows[1]  # row 61
    assert (last["user_id"], last["video_id"], last["hourmin"], last["tab"]) == (1, 10, 1300, 1)
    assert (last["is_hate"], last["long_view"], last["is_profile_enter"], last["play_time_ms"]) == (1, 0, 0, 6100)
    assert (last["author_id"], last["music_id"], last["music_type"], last["tag"]) == (901, 3115836533, 9, "39")
    assert (last["user_active_degree"], last["is_live_streamer"], last["follow_user_num_range"]) == (
        "full_active",
        -124,
        "(0,10]",
    )
    assert (last["onehot_feat3"], last["onehot_feat4"], last["onehot_feat17"]) == (638, None, None)
    assert rows[0]["tag"] == "12,65" and rows[0]["onehot_feat4"] == 4
    found = {statistic.name: statistic.found for statistic in done.statistics}
    assert (found["samples"], found["users"], found["items"]) == (62, 3, 4)
    if name == "kuairand_1k":
        assert (found["fields"], found["tasks"], found["hate rate"]) == (32, 8, pytest.approx(8 / 62))


@pytest.mark.parametrize(
    ("file", "replaced", "by", "message"),
    [
        (
            "user_features_1k.csv",
            "\n1,",
            "\n7,",
            "4_08_to_4_21_1k.csv: user_id 1 is not in user_features_1k.csv",
        ),
        ("video_features_basic_1k.csv", "\n0,", "\n5,", "1k.csv: video_id 0 is not in video_features_basic_1k.csv"),
        ("video_features_basic_1k.csv", "tag", "tags", "its first line names no column tag (video_id, author_id,"),
        (
            "video_features_basic_1k.csv",
            '65"',
            "65",
            "video_features_basic_1k.csv, line 2: a quote opens here and never",
        ),
        ("user_features_1k.csv", "\n1,", "\none,", "user_features_1k.csv, line 4: user_id is 'one', no integer"),
        ("log_standard_4_22_to_5_08_1k.csv", "\n", ",x\n", "4_22_to_5_08_1k.csv, line 2: should have 20 values"),
        ("log_standard_4_22_to_5_08_1k.csv", "20220508", "", "4_22_to_5_08_1k.csv, line 34: date is '', no integer"),
    ],
)
def test_files_of_kuairand_that_do_not_fit_are_named(
    file: str, replaced: str, by: str, message: str, tmp_path: Path
) -> None:
    path = kuairand_files(tmp_path / "raw", "kuairand_1k") / file
    path.write_text(path.read_text().replace(replaced, by, 1))
    assert message in refused("kuairand_1k", tmp_path / "raw", tmp_path / "data")


def test_a_lookup_finds_rows_by_keys_in_any_order() -> None:
    pieces = [
        pa.table({"key": [7, 3], "big": [2**40, None], "small": [-128, 127], "text": ["a", None]}),
        pa.table({"key": [5, 3], "big": [-1, 9], "small": [None, 0], "text": ["b", "c"]}),
    ]
    lookup = Lookup("key", iter(pieces))
    found = lookup.columns(np.array([3, 7, 3, 5]))
    assert {name: values.to_pylist() for name, values in found.items()} == {
        "big": [None, 2**40, None, -1],
        "small": [127, -128, 127, None],
        "text": [None, "a", None, "b"],
    }
    assert [values.type for values in found.values()] == [pa.int64(), pa.int64(), pa.string()]
    for missing in (1, 4, 8):
        with pytest.raises(KeyError, match=str(missing)):
            lookup.columns(np.array([3, missing]))
    nobody = Lookup("key", iter([pa.table({"key": pa.array([], pa.int64()), "x": pa.array([], pa.int64())})]))
    assert nobody.columns(np.zeros(0, np.int64))["x"].to_pylist() == []
    with pytest.raises(KeyError, match="3"):
        nobody.columns(np.array([3]))


# Ali-CCP: no header; features are "field \x02 id \x03 value" with \x01 between, and histories hold many ids.


def features(pairs: list[tuple[str, int]]) -> str:
    return "\x01".join(f"{field}\x02{identity}\x03{1.5 if field == '508' else 1.0}" for field, identity in pairs)


def ali_files(directory: Path) -> Path:
    """40 samples of 3 users for train and for test; every second one is clicked, every fourth bought."""
    directory.mkdir(exist_ok=True)
    for split in ("train", "test"):
        common, skeleton = [], []
        for user in range(3):
            pairs = [("101", 10 + user), ("109_14", 5), ("109_14", 6), ("121", 7), *([("124", 2)] if user else [])]
            common.append(f"{split}bacff9169295{user},{len(pairs)},{features(pairs)}")
        for row in range(40):
            pairs = [("205", 1000 + row), ("210", 1), ("210", 2), ("508", 3), ("853", 8), ("853", 9), ("301", 4)]
            labels = f"{int(row % 2 == 0)},{int(row % 4 == 0)}"
            # feature_num may count the fields or the features: both are accepted.
            skeleton.append(f"{row + 1},{labels},{split}bacff9169295{row % 3},{len(pairs) - row % 3},{features(pairs)}")
        (directory / f"common_features_{split}.csv").write_text("\n".join(common) + "\n")
        (directory / f"sample_skeleton_{split}.csv").write_text("\n".join(skeleton) + "\n")
    return directory


def test_ali_ccp_joins_skeletons_with_common_features(tmp_path: Path) -> None:
    done = made("ali_ccp", ali_files(tmp_path / "raw"), tmp_path / "data")
    sizes = [done.manifest.rows(split) for split in manifests.SPLITS]
    assert sizes[0] + sizes[1] == sizes[2] == 40 and sizes[1] > 0
    rows = raw_rows(tmp_path / "data", "test")
    assert len(rows) == 40
    for number, row in enumerate(rows):
        expected: dict[str, int | None] = dict.fromkeys([*ali_ccp._OF_USERS.values(), *ali_ccp._OF_SAMPLES.values()])
        expected |= {"user_id": 10 + number % 3, "profile": 7, "gender": 2 if number % 3 else None}
        expected |= {"item_id": 1000 + number, "history_category": 3, "history_intention": 9, "position": 4}
        expected |= {"click": int(number % 2 == 0), "buy": int(number % 4 == 0), "row_id": row["row_id"]}
        assert row == expected
    assert done.manifest.task_rate("test", "click") == 0.5
    assert done.manifest.task_rows("test", "conversion") == 20 and done.manifest.task_rate("test", "conversion") == 0.5
    found = {statistic.name: statistic.found for statistic in done.statistics}
    assert found == {"samples": 80, "users": 3, "items": 40, "tasks": 2}


@pytest.mark.parametrize(
    ("file", "replaced", "by", "message"),
    [
        (
            "sample_skeleton_train.csv",
            "\n3,1,0,trainbacff91692952",
            "\n3,1,0,trainbacff9169295x",
            "sample_skeleton_train.csv, line 3: the common features trainbacff9169295x are not in common_features",
        ),
        ("sample_skeleton_test.csv", "\n2,0,0", "\n2,0,2", "sample_skeleton_test.csv, line 2: buy is '2', not 0 or 1"),
        ("sample_skeleton_test.csv", "\n2,0,0", "\n2,0", "sample_skeleton_test.csv, line 2: should have 6 values"),
        (
            "sample_skeleton_test.csv",
            "205\x021001\x03",
            "205\x02\x03",
            "sample_skeleton_test.csv, line 2: its features",
        ),
        (
            "sample_skeleton_test.csv",
            "205\x021001",
            "204\x021001",
            "line 2: its features are not as many as its",
        ),
        (
            "common_features_test.csv",
            "\x01121\x027\x031.0",
            "",
            "common_features_test.csv, line 1: its features",
        ),
        ("common_features_train.csv", "101\x0212", "102\x0212", "common_features_train.csv, line 3: its features"),
        ("common_features_train.csv", ",4,", ",four,", "common_features_train.csv, line 1: feature_num is 'four', no"),
    ],
)
def test_files_of_ali_ccp_that_are_cut_or_do_not_fit_are_named(
    file: str, replaced: str, by: str, message: str, tmp_path: Path
) -> None:
    path = ali_files(tmp_path / "raw") / file
    assert replaced in path.read_text()
    path.write_text(path.read_text().replace(replaced, by, 1))
    assert message in refused("ali_ccp", tmp_path / "raw", tmp_path / "data")


def test_a_task_without_rows_has_no_rate(tmp_path: Path) -> None:
    raw = ali_files(tmp_path / "raw")
    for path in raw.glob("sample_skeleton_*.csv"):
        path.write_text(re.sub(r"(?m)^(\d+),\d,\d", r"\1,0,0", path.read_text()))
    done = made("ali_ccp", raw, tmp_path / "data")
    rate = compare(done.manifest, {"conversion rate": "0.53%"}, Options(done.manifest.schema, ""))[0]
    assert math.isnan(rate.found) and (rate.shown, rate.verdict) == ("nan%", "no rows")
    assert Compared("click rate", "37.76%", 0.377612345).shown == "37.7612%"


def test_lists_of_features_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.log.source.CHUNK_ROWS", 7)
    path = ali_files(tmp_path / "raw") / "sample_skeleton_train.csv"
    made("ali_ccp", tmp_path / "raw", tmp_path / "data")
    assert [row["item_id"] for row in raw_rows(tmp_path / "data", "test")] == list(range(1000, 1040))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:30], lines[30].replace("trainbac", "trainabc"), *lines[31:]]) + "\n")
    assert "sample_skeleton_train.csv, line 31: " in refused("ali_ccp", tmp_path / "raw", tmp_path / "other")
