"""Example bodies, as the contract document shows them (a test holds the two together)."""

from __future__ import annotations

from typing import Any

from api.errors import FAULTS

_TASK = "0c9f7f1e-51d1-4a1b-9a55-c0a1f5f3b7aa"
_BATCH_TASK = "b7d1a2f0-9d0e-4d0c-8a51-5b8e0a7f9f10"
_USER = "8a4a3c6e-6f10-4a0e-8b6a-2f1de0d3f2c1"
_LOCAL = "http://localhost:8000/files"
_SIZE = {"width": 128, "height": 96}
_MODEL = {"name": "SAM3", "version": "demo"}

_CIRCLE = {
    "score": 0.97,
    "box_xyxy_px": [12.0, 20.0, 53.0, 61.0],
    "area_px": 1257,
    "mask_rle": {
        "size": [96, 128],
        "counts": "XU11i2<H4L4L4M2N2N2N2O0O2O0O2O0O2O000000000O20N10000000001N101N101N101N2N2N2N3L4L4L8Dno6",
    },
}
_SQUARE = {
    "score": 0.91,
    "box_xyxy_px": [70.0, 10.0, 110.0, 50.0],
    "area_px": 1600,
    "mask_rle": {
        "size": [96, 128],
        "counts": "Zb6X1h100000000000000000000000000000000000000000000000000000000000000000000000000000fe1",
    },
}


def _timings(infer: float, total: float) -> dict[str, float]:
    before = {"download": 8.1, "decode": 3.0, "queue": 4.2}
    return {**before, "infer": infer, "encode": 1.2, "upload": 9.9, "row_update": 3.1, "total": total}


def _result_of_batch(index: int, prompt: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task_id": _BATCH_TASK,
        "mask_url": f"{_LOCAL}/masks/{_BATCH_TASK}/{index}.png",
        "labels": [prompt] if found else [],
        "inference_time_ms": 55.0,
        "confidence": found[0]["score"] if found else 0.0,
        "text_prompt": prompt,
        "instances": found,
        "image_size": _SIZE,
        "score_threshold": 0.5,
        "timings_ms": _timings(55.0, 80.0),
        "model": _MODEL,
    }


REQUESTS: dict[str, dict[str, Any]] = {
    "predict": {
        "image_url": "https://images.example.com/uploads/desk.jpg",
        "text_prompt": "red circle",
        "user_id": _USER,
        "task_id": _TASK,
        "score_threshold": 0.5,
    },
    "predict_batch": {
        "image_url": "uploads/desk.jpg",
        "prompts": ["red circle", "blue square"],
        "user_id": _USER,
        "task_id": _BATCH_TASK,
    },
}

RESPONSES: dict[str, dict[str, Any]] = {
    "health": {
        "status": "ok",
        "model_loaded": True,
        "gpu_available": False,
        "dependencies": {
            "storage": {
                "status": "down",
                "since": "2026-01-31T12:00:00.000000+00:00",
                "reason": "STORAGE_TIMEOUT",
            },
            "tasks": {"status": "ok", "since": None, "reason": None},
            "journal": {"status": "ok", "waiting": 3},
        },
    },
    "predict": {
        "task_id": _TASK,
        "mask_url": f"https://images.example.com/masks/{_TASK}.png",
        "labels": ["red circle"],
        "inference_time_ms": 41.7,
        "confidence": 0.97,
        "text_prompt": "red circle",
        "instances": [_CIRCLE],
        "image_size": _SIZE,
        "score_threshold": 0.5,
        "timings_ms": _timings(41.7, 66.0),
        "model": _MODEL,
    },
    "predict_batch": {
        "task_id": _BATCH_TASK,
        "results": [_result_of_batch(0, "red circle", []), _result_of_batch(1, "blue square", [_SQUARE])],
        "total_inference_time_ms": 55.0,
        "mask_url": f"{_LOCAL}/masks/{_BATCH_TASK}.png",
    },
    "task": {
        "task_id": _TASK,
        "status": "processing",
        "stage": "segment",
        "attempts": 1,
        "accepted_at": "2026-01-31T12:00:00.000000+00:00",
        "updated_at": "2026-01-31T12:00:00.100000+00:00",
    },
    "model_info": {
        "model_name": "SAM3",
        "model_version": "demo",
        "parameters": 1843210,
        "weights_size_gb": 0.007,
        "device": "cpu",
        "dtype": "float32",
        "input_size_px": 224,
        "max_text_tokens": 32,
        "max_prompts": 32,
        "max_batch_size": 16,
    },
    "put_file": {"url": f"{_LOCAL}/uploads/desk.jpg", "key": "uploads/desk.jpg"},
}

BATCH_PROMPTS: list[Any] = [
    "red circle",
    {"text_prompt": "square", "score_threshold": 0.3},
    {
        "boxes": [
            {"xyxy": [70, 10, 110, 50]},
            {"xyxy": [0, 0.5, 0.2, 0.9], "label": "negative", "unit": "relative"},
        ]
    },
]

OUTPUTS: dict[str, Any] = {
    "boxes": {
        "url": f"https://images.example.com/masks/{_TASK}.boxes.json",
        "media_type": "application/json",
        "inline": {
            "image_size": _SIZE,
            "instances": [
                {
                    "number": 1,
                    "label": "red circle",
                    "score": _CIRCLE["score"],
                    "box_xyxy_px": _CIRCLE["box_xyxy_px"],
                }
            ],
        },
    },
    "overlay": {
        "url": f"https://images.example.com/masks/{_TASK}.overlay.jpg",
        "media_type": "image/jpeg",
    },
}

ACCEPTED: dict[str, Any] = {"task_id": _TASK, "status": "processing"}

ERROR: dict[str, Any] = {
    "success": False,
    "data": None,
    "error": {
        "code": "VALIDATION_FAILED",
        "message": "2 fields are invalid; see details.",
        "details": [
            {"field": "text_prompt", "message": "Field required"},
            {"field": "score_threshold", "message": "Input should be less than or equal to 1"},
        ],
    },
    "meta": {
        "request_id": "4f1c8e0e-6c0f-4a53-9a39-0d2f4a2f5f77",
        "timestamp": "2026-01-31T12:00:00.000000+00:00",
    },
}


def error_body(code: str) -> dict[str, Any]:
    """An error body with this code, as it may look."""
    if code == ERROR["error"]["code"]:
        return ERROR
    message = next((fault.message for fault in FAULTS.values() if fault.code == code and fault.message), None)
    return {
        **ERROR,
        "error": {"code": code, "message": message or "What was expected, what came, what to do."},
    }
