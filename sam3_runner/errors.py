"""Errors of the runner. They know nothing of HTTP.

RunnerError
├── InvalidInput              the caller can mend it
│   ├── InvalidPrompt         blank, with a special token in it, or longer than the text encoder reads
│   ├── TooManyPrompts
│   ├── UnsupportedPrompt     of a kind that this checkpoint cannot answer
│   ├── InvalidRegion         nothing of the image lies in it
│   ├── OutputTooLarge        takes more time or memory than there is for it
│   └── ImageError
│       ├── UnsupportedImage  not a kind of file we read
│       ├── UndecodableImage  the right kind, but broken
│       └── ImageTooLarge     too many bytes or pixels
├── CheckpointError           the weights are not there, or not SAM3
├── DeviceOutOfMemory         nothing was computed; the runner stays usable
└── InferenceFailed           the model failed on this item
"""


class RunnerError(Exception):
    """Base of all errors that the runner raises."""


class InvalidInput(RunnerError):
    """The caller can mend it."""


class InvalidPrompt(InvalidInput):
    """A prompt is blank, has a special token in it, or is longer than the text encoder reads."""


class TooManyPrompts(InvalidInput):
    """More prompts for one image than `max_prompts`."""


class UnsupportedPrompt(InvalidInput):
    """A kind of prompt that the loaded checkpoint cannot answer."""


class InvalidRegion(InvalidInput):
    """A region of an image that has no area, or none inside the image."""


class OutputTooLarge(InvalidInput):
    """Making the outputs that were asked for takes more time or memory than there is."""


class ImageError(InvalidInput):
    """Base of everything that can be wrong with an image file."""


class UnsupportedImage(ImageError):
    """The bytes are not a kind of image file that we read."""


class UndecodableImage(ImageError):
    """The right kind of file, but truncated, corrupt or with a lying header."""


class ImageTooLarge(ImageError):
    """More bytes or more pixels than the limits allow."""


class CheckpointError(RunnerError):
    """The checkpoint is not there, or is not a SAM3 checkpoint that we can load."""


class DeviceOutOfMemory(RunnerError):
    """The device ran out of memory: nothing was computed, and the runner stays usable."""


class InferenceFailed(RunnerError):
    """The model failed on this item."""
