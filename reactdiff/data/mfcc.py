"""Kaldi mel-frequency cepstra on the video's clock: one 40 ms frame of sound for every video frame."""

import kaldi_native_fbank as kaldi
import numpy as np

from reactdiff.clip import FRAME_RATE

MFCC_WIDTH = 26


def mfcc(sound: np.ndarray, rate: int) -> np.ndarray:
    """The cepstra of a sound, (samples,) in [-1, 1] at `rate` Hz -> (whole 40 ms frames, 26) float32.

    Kaldi's MFCC without dither, as `torchaudio.compliance.kaldi.mfcc` sets it up: frames of 40 ms that neither overlap nor
    leave a gap, DC removed, pre-emphasis 0.97, Povey window, 26 mel bins from 20 Hz to Nyquist, 26 cepstra liftered by 22,
    and in column 0 the raw log energy, floored at log 1.

    Raises:
        ValueError: if a video frame is not a whole number of samples at this rate.
    """
    if rate <= 0 or rate % FRAME_RATE:
        raise ValueError(f"a sampling rate of {rate} Hz gives no whole number of samples per video frame; use a multiple of {FRAME_RATE}")
    if len(sound) < rate // FRAME_RATE:
        return np.empty((0, MFCC_WIDTH), np.float32)
    extractor = kaldi.OnlineMfcc(_options(rate))
    extractor.accept_waveform(rate, np.ascontiguousarray(sound, np.float32))
    extractor.input_finished()
    return np.stack([extractor.get_frame(frame) for frame in range(extractor.num_frames_ready)])


def _options(rate: int) -> kaldi.MfccOptions:
    options = kaldi.MfccOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.frame_length_ms = options.frame_opts.frame_shift_ms = 1000 / FRAME_RATE
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = options.num_ceps = MFCC_WIDTH
    options.use_energy = True
    options.energy_floor = 1.0
    return options
