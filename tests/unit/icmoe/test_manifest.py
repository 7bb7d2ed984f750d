"""What a manifest may say, and how its mistakes are told."""

from pathlib import Path

import pytest

from icmoe.data.manifest import load_manifest
from icmoe.errors import ManifestError

HEADER = "image,mask,patient,split,site"


def write(folder: Path, *lines: str, header: str = HEADER, files: bool = True, encoding: str = "utf-8") -> Path:
    (folder / "manifest.csv").write_text("\n".join([header, *lines]) + "\n", encoding=encoding)
    for line in lines if files else ():
        for name in line.split(",")[:2]:
            if name and not name.startswith(("/", "..")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
    return folder


def test_reads_all_columns_as_text(tmp_path: Path) -> None:
    write(
        tmp_path,
        "a.png,am.png,007,train,2,0.7x0.8,5,x",
        "b.png,bm.png,8,test,2,,,",
        "c.png,cm.png,007,train,1,0.5,,",
        header=HEADER + ",spacing,slice,scanner",
    )
    manifest = load_manifest(tmp_path)
    first = manifest.samples[0]
    assert (first.patient, first.site, first.slice, first.spacing) == ("007", "2", "5", (0.7, 0.8))
    assert first.image == tmp_path / "a.png"
    assert [sample.spacing for sample in manifest.samples[1:]] == [None, (0.5, 0.5)]
    assert manifest.sites == ("1", "2")
    assert manifest.select(site="2", split="test") == (manifest.samples[1],)
    assert manifest.select(split="train") == (manifest.samples[0], manifest.samples[2])


def test_optional_columns_may_be_missing(tmp_path: Path) -> None:
    write(tmp_path, "a.png,am.png,p,train", header="image,mask,patient,split")
    assert load_manifest(tmp_path, default_site="oslo").samples[0].site == "oslo"


def test_takes_a_csv_path_byte_order_mark_quotes_and_blank_lines(tmp_path: Path) -> None:
    write(tmp_path, "a.png,am.png,p,train,s", encoding="utf-8-sig")
    path = tmp_path / "other.csv"
    (tmp_path / "manifest.csv").rename(path)
    path.write_text(path.read_text(encoding="utf-8") + '\n a.png ,am.png,"p, q",train,t\n', encoding="utf-8")
    with pytest.raises(ManifestError, match=r"a\.png is listed 2 times"):
        load_manifest(path)
    path.write_text(path.read_text(encoding="utf-8").replace(" a.png ", "am.png"), encoding="utf-8")
    assert [sample.patient for sample in load_manifest(path).samples] == ["p", "p, q"]


def test_the_same_patient_name_at_two_sites_is_two_people(tmp_path: Path) -> None:
    write(tmp_path, "a.png,am.png,1,train,s", "b.png,bm.png,1,test,t", "c.png,cm.png,2,train,t")
    assert len(load_manifest(tmp_path).samples) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b.png,bm.png,p,Train,s", r"line 3: split is 'Train'. Allowed are train, val, test"),
        ("b.png,bm.png,p,val,s", r"patient p of site s is in the splits train, val"),
        ("a.png,bm.png,p,train,s", r"image a\.png is listed 2 times"),
        ("./a.png,bm.png,p,train,s", r"image a\.png is listed 2 times"),
        ("../b.png,bm.png,p,train,s", r"line 3: the image \.\./b\.png leaves the data folder"),
        ("b.png,/etc/passwd,p,train,s", r"line 3: the mask /etc/passwd leaves the data folder"),
        ("b.png,bm.png,q,test,t", r"site t has no image with split train"),
        ("b.png,,p,train,s", r"line 3: no value for mask"),
        ("b.png,bm.png,p,train,", r"line 3: no value for site"),
        ("b.png,bm.png", r"line 3: no value for patient, split, site"),
        ("b.png,bm.png,p,train,s,extra", r"line 3: more values than columns \('extra'"),
        ("b.png,bm.png,p,train,s/t", r"line 3: site is 's/t'"),
    ],
)
def test_names_the_line_and_the_mistake(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, "a.png,am.png,p,train,s", line)
    with pytest.raises(ManifestError, match=message):
        load_manifest(tmp_path)


@pytest.mark.parametrize("spacing", ["0", "-1", "nan", "inf", "0.7mm", "1x2x3", "0.7x"])
def test_spacing_is_one_or_two_positive_numbers(tmp_path: Path, spacing: str) -> None:
    write(tmp_path, f"a.png,am.png,p,train,s,{spacing}", header=HEADER + ",spacing")
    with pytest.raises(ManifestError, match=r"line 2: spacing is .* 0\.7 or 0\.7x0\.8"):
        load_manifest(tmp_path)


def test_missing_files_are_gathered_and_cut_at_ten(tmp_path: Path) -> None:
    write(tmp_path, *(f"{i}.png,m{i}.png,p,train,s" for i in range(8)), files=False)
    with pytest.raises(ManifestError) as caught:
        load_manifest(tmp_path)
    assert "line 2: the image 0.png does not exist" in str(caught.value)
    assert str(caught.value).count("does not exist") == 10
    assert "and 6 more" in str(caught.value)


def test_backslashes_get_a_hint(tmp_path: Path) -> None:
    write(tmp_path, "images\\a.png,am.png,p,train,s", files=False)
    with pytest.raises(ManifestError, match="Write / between folders"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "lacks the columns image, mask, patient, split; it has: nothing"),
        (b"image,mask,patient,split\n", "lists no images"),
        (b"image,mask,site\na,b,c\n", r"lacks the columns patient, split; it has: image, mask, site\. Needed"),
        (b"image;mask;patient;split\n", "Separate columns with commas"),
        (b"image,mask,patient,split,image\n", "names columns twice: image"),
        (b"image,mask,patient,split\n\xe4.png,b,c,train\n", "not UTF-8"),
        (b'image,mask,patient,split\n"a.png,b,c,train\n', "unclosed quotation mark"),
    ],
)
def test_explains_malformed_files(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "manifest.csv").write_bytes(text)
    with pytest.raises(ManifestError, match=message):
        load_manifest(tmp_path)


def test_explains_a_missing_manifest_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"there is no manifest\.csv in .*image, mask, patient, split"):
        load_manifest(tmp_path)
    with pytest.raises(ManifestError, match=r"data folder .*nowhere does not exist"):
        load_manifest(tmp_path / "nowhere")
