"""RTSTRUCT on a real CT series: shapes of known area, and structure sets that must be refused."""

import csv
import json
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from PIL import Image, ImageDraw
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from icmoe.cli import app
from icmoe.data import dicom
from icmoe.data.importing import ImportRequest, import_folder
from icmoe.data.manifest import load_manifest
from icmoe.data.pairing import find_pairs
from icmoe.data.rtstruct import Structures, fill_polygon, read_structures, referenced_images
from icmoe.data.sources import load_raw_labels
from icmoe.data.volumes import read_labels, read_volume
from icmoe.errors import ConfigError, DataError, MaskError

ROOT = Path(os.environ.get("ICMOE_TEST_DATA", "/nowhere")) / "formats" / "dicom"
CT = ROOT / "ct_3slice_with_seg"
needs_files = pytest.mark.skipif("ICMOE_TEST_DATA" not in os.environ, reason="ICMOE_TEST_DATA is not set")
SIDE = 512
CENTRE = (200.3, 260.7)
"""Row and column, off the pixels' centres."""

Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Roi:
    """Contours as (slice, points in rows and columns); with ``named`` false they name no image."""

    name: str
    number: int
    contours: Sequence[tuple[float, Points]]
    named: bool = True
    kind: str = "CLOSED_PLANAR"


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    """Files under one path change between tests."""
    yield
    for cached in (read_volume, read_labels, dicom.list_series):
        cached.cache_clear()


def circle(radius: float, centre: tuple[float, float] = CENTRE, points: int = 400) -> Points:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([centre[0] + radius * np.sin(angle), centre[1] + radius * np.cos(angle)], axis=1)


def box(top: float, left: float, bottom: float, right: float) -> Points:
    return np.array([[top, left], [top, right], [bottom, right], [bottom, left]])


def distance() -> Points:
    """Of each pixel to ``CENTRE``."""
    rows, columns = np.indices((SIDE, SIDE))
    return np.sqrt((rows - CENTRE[0]) ** 2 + (columns - CENTRE[1]) ** 2)


def write_structures(path: Path, rois: Sequence[Roi], *, folder: Path = CT, **changes: Any) -> Path:
    """An RTSTRUCT as planning systems write it: contours in mm, each naming its image."""
    headers = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, folder.glob("*.dcm"))}
    images = [headers[uid] for uid in read_volume(folder).instances]
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.Modality = generate_uid(), generate_uid(), "RTSTRUCT"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for roi in rois:
        described = pydicom.Dataset()
        described.ROINumber, described.ROIName = roi.number, roi.name
        described.ReferencedFrameOfReferenceUID = images[0].FrameOfReferenceUID
        dataset.StructureSetROISequence.append(described)
        item = pydicom.Dataset()
        item.ReferencedROINumber = roi.number
        item.ContourSequence = [contour_item(roi, place, points, images) for place, points in roi.contours]
        dataset.ROIContourSequence.append(item)
    for tag, value in changes.items():
        setattr(dataset, tag, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    return path


def contour_item(roi: Roi, place: float, points: Points, images: Sequence[pydicom.Dataset]) -> pydicom.Dataset:
    contour = pydicom.Dataset()
    contour.ContourGeometricType = roi.kind
    contour.NumberOfContourPoints = len(points)
    contour.ContourData = [f"{value:.4f}" for value in millimetres(place, points, images).ravel()]
    if roi.named:
        image = pydicom.Dataset()
        image.ReferencedSOPInstanceUID = images[round(place)].SOPInstanceUID
        contour.ContourImageSequence = [image]
    return contour


def millimetres(place: float, points: Points, images: Sequence[pydicom.Dataset]) -> Points:
    """DICOM's own equation (PS3.3 C.7.6.2.1-1): the reader's geometry must not be tested by itself."""
    first, second = (np.array(image.ImagePositionPatient, dtype=float) for image in images[:2])
    along_row, along_column = np.array(images[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    row_spacing, column_spacing = map(float, images[0].PixelSpacing)
    rows, columns = points.T[..., None]
    origin = first + place * (second - first)
    return np.asarray(origin + along_row * column_spacing * columns + along_column * row_spacing * rows)


def read(path: Path, folder: Path = CT, rois: Sequence[str] = ()) -> Structures:
    stored = read_volume(folder)
    return read_structures(path, stored.grid.get_geometry(), stored.instances, rois=rois)


def copy_series(folder: Path, *, seed: int = 0, turned: npt.NDArray[np.float64] | None = None, **changes: Any) -> Path:
    """The CT as another patient's, with other pixels, UIDs and file names; in space, turned by a rotation matrix."""
    folder.mkdir(parents=True)
    series = generate_uid()
    for number in (3, 1, 2):
        dataset = pydicom.dcmread(CT / f"0{number}.dcm")
        noise = np.random.default_rng(seed).integers(0, 50, dataset.pixel_array.shape)
        dataset.PixelData = (dataset.pixel_array + noise).astype(dataset.pixel_array.dtype).tobytes()
        dataset.SeriesInstanceUID = series
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        if turned is not None:
            orientation = np.array(dataset.ImageOrientationPatient, dtype=float).reshape(2, 3) @ turned.T
            dataset.ImageOrientationPatient = [f"{value:.12f}" for value in orientation.ravel()]
            position = turned @ np.array(dataset.ImagePositionPatient, dtype=float)
            dataset.ImagePositionPatient = [f"{value:.8f}" for value in position]
        for tag, value in changes.items():
            setattr(dataset, tag, value)
        dataset.save_as(folder / f"image{7 * number % 5}.dcm")
    return folder


@needs_files
@pytest.mark.shared_data
class TestShapes:
    @pytest.mark.parametrize("radius", [6.0, 40.0, 150.0])
    @pytest.mark.parametrize("named", [True, False])
    def test_a_disc_has_its_area(self, tmp_path: Path, radius: float, named: bool) -> None:
        roi = Roi("Liver", 4, [(1, circle(radius))], named=named)
        structures = read(write_structures(tmp_path / "rs.dcm", [roi]))
        assert (structures.names, structures.left_out) == ({4: "Liver"}, {})
        labels = structures.volume.array
        assert not labels[[0, 2]].any()
        away = distance() - radius
        assert (labels[1][away < -0.05] == 4).all()  # 4 decimals of a millimetre and 400 corners leave so much
        assert not labels[1][away > 0.05].any()
        assert np.count_nonzero(labels) == pytest.approx(np.pi * radius**2, rel=0.03 if radius < 10 else 0.002)

    def test_a_contour_inside_another_is_a_hole_and_one_inside_that_is_filled(self, tmp_path: Path) -> None:
        roi = Roi("Ring", 1, [(0, circle(20)), (0, circle(60)), (0, circle(8))])
        labels = read(write_structures(tmp_path / "rs.dcm", [roi])).volume.array[0]
        away = distance()
        filled = ((away > 20.05) & (away < 59.95)) | (away < 7.95)
        empty = ((away > 8.05) & (away < 19.95)) | (away > 60.05)
        assert (labels[filled] == 1).all()
        assert not labels[empty].any()

    def test_a_hole_cut_by_a_channel_without_width(self, tmp_path: Path) -> None:
        outer, inner = circle(60), circle(20)[::-1]
        ring = np.concatenate([outer, outer[:1], inner[-1:], inner])
        labels = read(write_structures(tmp_path / "rs.dcm", [Roi("Ring", 1, [(0, ring)])])).volume.array[0]
        assert np.count_nonzero(labels) == pytest.approx(np.pi * (60**2 - 20**2), rel=0.002)

    @pytest.mark.parametrize("named", [True, False])
    def test_contours_and_files_in_any_order(self, tmp_path: Path, named: bool) -> None:
        folder = copy_series(tmp_path / "ct")
        contours = [(2, circle(30)), (0, circle(10))]
        path = write_structures(tmp_path / "rs.dcm", [Roi("Liver", 1, contours, named=named)], folder=folder)
        counts = np.count_nonzero(read(path, folder).volume.array, axis=(1, 2))
        np.testing.assert_allclose(counts, [np.pi * 10**2, 0, np.pi * 30**2], rtol=0.02)
        np.testing.assert_array_equal(read_labels(path, image=folder).array, read(path, folder).volume.array)

    @pytest.mark.parametrize(
        "angles", [(0.0, 0.0, 0.0), (90.0, 0.0, 0.0), (20.0, -35.0, 50.0)], ids=["axial", "coronal", "oblique"]
    )
    @pytest.mark.parametrize("named", [True, False])
    def test_in_any_plane(self, tmp_path: Path, angles: tuple[float, ...], named: bool) -> None:
        turned = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
        folder = copy_series(tmp_path / "ct", turned=turned)
        roi = Roi("Liver", 1, [(2, circle(40))], named=named)
        labels = read(write_structures(tmp_path / "rs.dcm", [roi], folder=folder), folder).volume.array
        away = distance() - 40
        assert (labels[2][away < -0.05] == 1).all()
        assert not labels[2][away > 0.05].any()
        assert not labels[:2].any()

    def test_neighbours_that_share_a_border_part_the_voxels(self, tmp_path: Path) -> None:
        border = np.stack([np.linspace(100.5, 200.5, 50), 150 + 20 * np.sin(np.linspace(0, 9, 50))], axis=1)
        left = np.concatenate([border, [[200.5, 90.5], [100.5, 90.5]]])
        right = np.concatenate([border[::-1], [[100.5, 220.5], [200.5, 220.5]]])
        path = write_structures(tmp_path / "rs.dcm", [Roi("L", 1, [(0, left)]), Roi("R", 2, [(0, right)])])
        labels = read(path).volume.array[0]
        assert set(np.unique(labels)) == {0, 1, 2}
        assert np.count_nonzero(labels) == 100 * 130
        assert (labels[101:201, 91:221] > 0).all()


@needs_files
@pytest.mark.shared_data
class TestChoice:
    def test_names_choose_and_number_in_their_order(self, tmp_path: Path) -> None:
        rois = [
            Roi("BODY", 1, [(0, circle(150))]),
            Roi("Spleen", 0, [(0, box(300.3, 300.3, 320.3, 320.3))]),
            Roi("Liver", 9, [(0, circle(30))]),
        ]
        structures = read(write_structures(tmp_path / "rs.dcm", rois), rois=("liver", "SPLEEN", "Tumour"))
        assert structures.names == {1: "Liver", 2: "Spleen"}
        assert structures.left_out == {"Tumour": "no ROI has this name"}
        assert np.count_nonzero(structures.volume.array == 2) == 20 * 20

    def test_points_and_empty_regions_are_left_out_and_said(self, tmp_path: Path) -> None:
        rois = [
            Roi("Isocentre", 1, [(0, np.array([[10.0, 10.0]]))], kind="POINT"),
            Roi("Liver", 2, [(0, circle(30))]),
            Roi("Empty", 3, []),
            Roi("Speck", 4, [(0, box(300.2, 300.2, 300.4, 300.4))]),
        ]
        structures = read(write_structures(tmp_path / "rs.dcm", rois))
        assert structures.left_out == {
            "Isocentre": "1 POINT; only CLOSED_PLANAR contours enclose voxels",
            "Empty": "no contour",
            "Speck": "its contours enclose no voxel's centre",
        }
        with pytest.raises(MaskError, match=r"no closed contour to use \(Isocentre: 1 POINT"):
            read(write_structures(tmp_path / "points.dcm", rois[:1]))


@needs_files
@pytest.mark.shared_data
class TestRefused:
    @pytest.mark.parametrize(
        ("rois", "told"),
        [
            ([Roi("A", 1, [(0, circle(30))]), Roi("B", 2, [(0, circle(10))])], r"'B' and 'A'.*overlap in 3\d\d voxels"),
            ([Roi("A", 0, [(0, circle(30))])], "number 0, but 0 is the background.*--roi"),
            ([Roi("A", 1, [(0, circle(400))])], "leaves the image"),
            ([Roi("A", 1, [(0, circle(9)), (2.7, circle(9))], named=False)], "1 of 2 contours of ROI 'A'"),
            ([Roi("A", 1, [(-1, circle(9)), (3, circle(9))], named=False)], "2 of 2 contours of ROI 'A'"),
        ],
    )
    def test_what_a_mask_cannot_hold(self, tmp_path: Path, rois: list[Roi], told: str) -> None:
        with pytest.raises(MaskError, match=told):
            read(write_structures(tmp_path / "rs.dcm", rois))

    def test_a_contour_away_from_the_image_it_names(self, tmp_path: Path) -> None:
        path = write_structures(tmp_path / "rs.dcm", [Roi("A", 1, [(0, circle(9)), (1, circle(9))])])
        dataset = pydicom.dcmread(path)
        first, second = dataset.ROIContourSequence[0].ContourSequence
        first.ContourImageSequence, second.ContourImageSequence = (
            second.ContourImageSequence,
            first.ContourImageSequence,
        )
        dataset.save_as(path)
        with pytest.raises(MaskError, match="2 of 2 contours"):
            read(path)

    def test_a_contour_across_the_slices(self, tmp_path: Path) -> None:
        path = write_structures(tmp_path / "rs.dcm", [Roi("A", 1, [(1, circle(9))], named=False)])
        dataset = pydicom.dcmread(path)
        contour = dataset.ROIContourSequence[0].ContourSequence[0]
        points = np.asarray(contour.ContourData, dtype=float).reshape(-1, 3)
        points[:, 2] += np.linspace(-0.8, 0.8, len(points))
        contour.ContourData = [f"{value:.4f}" for value in points.ravel()]
        dataset.save_as(path)
        with pytest.raises(MaskError, match=r"1 of 1 contours.*in the plane of the slices"):
            read(path)

    def test_images_that_are_missing_or_of_another_series(self, tmp_path: Path) -> None:
        path = write_structures(tmp_path / "rs.dcm", [Roi("A", 1, [(0, circle(9)), (2, circle(9))])])
        with pytest.raises(MaskError, match="names 2 images and none is in this series"):
            read(path, copy_series(tmp_path / "other"))
        two = tmp_path / "two"
        two.mkdir()
        for number in ("01", "02"):
            (two / f"{number}.dcm").write_bytes((CT / f"{number}.dcm").read_bytes())
        with pytest.raises(MaskError, match=r"1 of 2 contours.*name images that are not here"):
            read(path, two)

    def test_positions_of_another_frame_of_reference_mean_nothing(self, tmp_path: Path) -> None:
        path = write_structures(tmp_path / "rs.dcm", [Roi("A", 1, [(0, circle(9))], named=False)])
        with pytest.raises(MaskError, match="another frame of reference"):
            read(path, copy_series(tmp_path / "other", FrameOfReferenceUID=generate_uid()))

    @pytest.mark.parametrize("data", [["1.0", "2.0"], ["nan", "1.0", "1.0"] * 3, ["1e30", "1", "1"] * 3])
    def test_damaged_coordinates(self, tmp_path: Path, data: list[str]) -> None:
        path = write_structures(tmp_path / "rs.dcm", [Roi("A", 1, [(0, circle(9))])])
        dataset = pydicom.dcmread(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, of the values that are meant to be wrong
            dataset.ROIContourSequence[0].ContourSequence[0].ContourData = data
            dataset.save_as(path)
        with pytest.raises(DataError, match=r"cannot be read|lie on no slice|leaves the image"):
            read(path)

    def test_damage_is_never_a_traceback(self, tmp_path: Path) -> None:
        path = write_structures(
            tmp_path / "rs.dcm", [Roi("A", 1, [(0, circle(9, points=8)), (1, circle(9, points=8))])]
        )
        whole, rng = path.read_bytes(), random.Random(0)
        outcomes = set()
        for number in range(150):
            damaged = bytearray(whole[: rng.randrange(132, len(whole))] if number % 3 == 0 else whole)
            for _ in range(rng.randint(1, 8)):
                damaged[rng.randrange(132, len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged)
            try:
                referenced_images(path)
                read(path)
                outcomes.add("read")
            except DataError as error:
                outcomes.add(type(error).__name__)
        assert outcomes == {"read", "DataError", "MaskError"}

    def test_a_structure_set_without_its_images(self, tmp_path: Path) -> None:
        """Of pydicom's test files: its images are not there, it names a series only, and it lacks the preamble."""
        plan = pydicom.dcmread(ROOT / "pydicom" / "rtstruct.dcm", force=True)
        folder = copy_series(tmp_path / "ct")
        raw = folder / "raw.dcm"
        raw.write_bytes((ROOT / "pydicom" / "rtstruct.dcm").read_bytes())
        with pytest.raises(DataError, match=r"found none.*raw\.dcm: it lacks the preamble of a DICOM file"):
            find_pairs(folder, labels="rtstruct", patient_pattern="", label_pattern="")
        raw.unlink()
        dicom.list_series.cache_clear()
        plan.save_as(folder / "plan.dcm", enforce_file_format=True)
        with pytest.raises(DataError, match=r"plan\.dcm: the series it was made on is not here"):
            find_pairs(folder, labels="rtstruct", patient_pattern="", label_pattern="")
        with pytest.raises(MaskError, match="3 of 3 contours of ROI 'patient'"):
            read_labels(folder / "plan.dcm", image=folder)


@needs_files
@pytest.mark.shared_data
class TestImport:
    def request(self, archive: Path, out: Path, **changes: Any) -> ImportRequest:
        return ImportRequest(archive, out, labels="rtstruct", site="h", secret=bytes(range(32)), **changes)

    def archive(self, folder: Path, rois: Sequence[Sequence[Roi]]) -> Path:
        for number, one in enumerate(rois):
            series = copy_series(folder / f"P{number}", seed=number, PatientID=f"P{number}")
            write_structures(series / "rs.dcm", one, folder=series)
        return folder

    def test_a_number_that_means_two_things_is_refused_and_names_solve_it(self, tmp_path: Path) -> None:
        liver, body = Roi("Liver", 1, [(0, circle(20))]), Roi("BODY", 1, [(0, circle(100))])
        archive = self.archive(tmp_path / "archive", [[liver], [body, Roi("LIVER", 2, [(1, circle(30))])]])
        with pytest.raises(ConfigError, match=r"ROI number 1 means 'BODY'.*and 'Liver'.*--roi"):
            import_folder(self.request(archive, tmp_path / "none"))
        report = import_folder(self.request(archive, tmp_path / "out", rois=("liver",)))
        assert (report.num_images, report.names, report.skipped) == (6, {1: "Liver"}, {})
        samples = load_manifest(tmp_path / "out").samples
        counts = [np.count_nonzero(load_raw_labels(sample) == 1) for sample in samples]
        assert sum(counts[:3]) == pytest.approx(np.pi * 20**2, rel=0.01)
        assert sum(counts[3:]) == pytest.approx(np.pi * 30**2, rel=0.01)
        assert all(sample.mask.name.endswith(".nii.gz") for sample in samples)

    @pytest.mark.slow
    def test_import_and_check(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ICMOE_SITE_DIR", str(tmp_path / "site"))
        monkeypatch.setenv("ICMOE_CACHE_DIR", str(tmp_path / "cache"))
        point = Roi("Iso", 7, [(0, np.array([[5.0, 5.0]]))], kind="POINT")
        slices = [[(place, circle(20 + 10 * number)) for place in range(3)] for number in range(3)]
        archive = self.archive(tmp_path / "archive", [[Roi("Liver", 3, one), point] for one in slices])
        out = tmp_path / "out"
        done = invoke("import", archive, "--out", out, "--labels", "rtstruct", "--json")
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        assert report["names"] == {"3": "Liver"}
        assert report["skipped"]["P0/rs.dcm ROI 'Iso'"].startswith("1 POINT")
        with (out / "manifest.csv").open(newline="") as file:
            assert {Path(line["mask"]).name for line in csv.DictReader(file)} == {"rs.dcm"}
        areas = sorted(np.count_nonzero(load_raw_labels(sample) == 3) for sample in load_manifest(out).samples)
        np.testing.assert_allclose(areas, np.repeat([np.pi * r**2 for r in (20, 30, 40)], 3), rtol=0.01)
        checked = invoke("check", out, "--accept", "--workers", "1")
        assert checked.exit_code == 0, checked.output
        assert "used 9 of 9" in checked.output


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["data", *map(str, arguments)], standalone_mode=False)


def finely(points: Points, shape: tuple[int, int], fine: int = 32) -> npt.NDArray[np.bool_]:
    """The slow twin: Pillow on a picture so fine that its rounding and its outline do not matter, read at centres."""
    picture = Image.new("1", (shape[1] * fine, shape[0] * fine))
    corners = np.rint((points[:, ::-1] + 0.5) * fine)
    ImageDraw.Draw(picture).polygon([(x, y) for x, y in corners], fill=1)
    return np.asarray(picture)[fine // 2 :: fine, fine // 2 :: fine]


class TestFill:
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_a_very_fine_picture_but_for_the_rim(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        angle = np.sort(rng.uniform(0, 2 * np.pi, 40))
        radius = rng.uniform(8, 30, 40)
        star = np.stack([32 + radius * np.sin(angle), 40 + radius * np.cos(angle)], axis=1)
        mine, twin = fill_polygon(star, (64, 80)), finely(star, (64, 80))
        length = np.hypot(*(star - np.roll(star, 1, axis=0)).T).sum()
        assert np.count_nonzero(mine != twin) <= 0.05 * length
        assert np.count_nonzero(mine) > 300

    def test_a_pixel_whose_centre_is_on_a_border_counts_once(self) -> None:
        quarters = [box(4, 4, 8, 8), box(4, 8, 8, 12), box(8, 4, 12, 8), box(8, 8, 12, 12)]
        counts = sum(fill_polygon(one, (16, 16)).astype(int) for one in quarters)
        assert np.count_nonzero(counts == 1) == 8 * 8
        assert np.max(counts) == 1

    @pytest.mark.parametrize("points", [np.zeros((1, 2)), np.array([[1.0, 1.0], [5.0, 5.0]]), np.zeros((0, 2))])
    def test_what_encloses_nothing_is_empty(self, points: Points) -> None:
        assert not fill_polygon(points, (8, 8)).any()

    def test_cut_off_at_the_picture(self) -> None:
        assert fill_polygon(box(-5, -5, 3, 20), (8, 8)).sum() == 3 * 8
