"""The published form of FID's Inception: its fixture, array by array."""

from tokgen.pretrained import parity


def test_the_fixture_holds(shared):
    lines, computed = parity.hold(parity.Folder(shared / "parity" / "inception_fid"))
    assert {line.name: line.verdict for line in lines if line.verdict != "pass"} == {
        "image_u8": "given"
    }
    # the tolerance is 1e-4; what float32 costs here is far below it
    assert max(line.relative for line in lines if line.relative is not None) < 3e-6
    # the two ways in are not mistaken for each other
    found, wanted = computed["pytorch_fid_pool3"], computed["fidelity_pool3"]
    assert abs(found - wanted).max() > 1e-2 * abs(wanted).max()
