import numpy as np
import pytest

from reactdiff.data.mfcc import mfcc


def cepstra_by_the_book(sound, rate):
    """Kaldi's MFCC from its documentation, in float64: the frame's own DC and pre-emphasis, Povey window, HTK mel scale."""
    length = rate // 25
    frames = sound[: len(sound) // length * length].reshape(-1, length).astype(np.float64)
    frames = frames - frames.mean(axis=1, keepdims=True)
    energy = np.log(np.maximum((frames**2).sum(axis=1), 1.0))
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames = frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))) ** 0.85
    size = 1 << (length - 1).bit_length()
    power = np.abs(np.fft.rfft(frames, size)) ** 2
    logs = np.log(np.maximum(power @ mel_bank(rate, size), np.finfo(np.float32).eps))
    k, n = np.arange(26)[:, None], np.arange(26)
    transform = np.sqrt(2 / 26) * np.cos(np.pi / 26 * (n + 0.5) * k)
    transform[0] = np.sqrt(1 / 26)
    rows = logs @ transform.T * (1 + 11 * np.sin(np.pi * np.arange(26) / 22))
    rows[:, 0] = energy
    return rows


def mel_bank(rate, size):
    edges = np.linspace(mel(20), mel(rate / 2), 28)
    bins = mel(np.arange(size // 2 + 1) * rate / size)[:, None]
    up, down = (bins - edges[:-2]) / np.diff(edges[:-1]), (edges[2:] - bins) / np.diff(edges[1:])
    bank = np.maximum(np.minimum(up, down), 0)
    bank[-1] = 0  # Kaldi leaves the Nyquist bin out
    return bank


def mel(hertz):
    return 1127 * np.log(1 + np.asarray(hertz) / 700)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_the_cepstra_are_kaldis(rate):
    seconds = np.arange(rate) / rate
    sound = 0.1 * np.random.default_rng(0).standard_normal(rate) * (1 + np.sin(9 * seconds)) + 0.3 * np.sin(2 * np.pi * 200 * seconds)
    np.testing.assert_allclose(mfcc(sound, rate), cepstra_by_the_book(sound, rate), atol=0.02)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000])
def test_there_is_one_row_for_every_whole_video_frame_at_any_rate(rate):
    assert mfcc(np.zeros(rate // 25 * 751 + 7), rate).shape == (751, 26)


def test_a_row_depends_on_its_own_40_ms_only():
    sound = np.random.default_rng(1).standard_normal(640 * 10)
    changed = sound.copy()
    changed[640 * 5 : 640 * 6] *= 0.1
    assert np.flatnonzero((mfcc(sound, 16_000) != mfcc(changed, 16_000)).any(axis=1)).tolist() == [5]


def test_a_rate_without_whole_samples_per_frame_is_refused():
    with pytest.raises(ValueError, match="16001 Hz"):
        mfcc(np.zeros(20_000), 16_001)
