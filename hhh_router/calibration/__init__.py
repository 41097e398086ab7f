"""Raw scores → evidence: calibrators, confidence, and the file that holds them.

Plain Python at run time. Fitting (`hhh_router.calibration.fit`) and figures (`hhh_router.calibration.metrics`) need
numpy and scipy and are imported by name where they are used.
"""

from hhh_router.calibration.calibrators import HeadCalibration, logit_of, probability
from hhh_router.calibration.confidence import FEATURES, Confidence, ConfidenceModel, FeatureWeight, confidence_features
from hhh_router.calibration.evidence import CalibrationFile, Calibrators, ModeCalibration

__all__ = [
    "FEATURES",
    "CalibrationFile",
    "Calibrators",
    "Confidence",
    "ConfidenceModel",
    "FeatureWeight",
    "HeadCalibration",
    "ModeCalibration",
    "confidence_features",
    "logit_of",
    "probability",
]
