"""Checks after the scan that validation is not the training text again, and that text is left to train on."""

from data_prep.jobs.working_directory import WorkingDirectory
from data_prep.stages.encode import read_kept_rows
from data_prep.stages.scan import scan_record_path
from data_prep.stages.write_manifest import make_input_records
from megatron_rdt.errors import ConfigError


class SameTextError(ConfigError):
    """Sources and validation sources have the same text: the scan is of no use, and nothing of it is kept."""


def check_files_differ(work: WorkingDirectory) -> None:
    """Raise SameTextError if, with `dedup` none, a file of the validation sources equals one of the others.

    Unless `dedup` is none, this is no fault: documents that are in both are validation only.
    """
    if work.job.config.dedup != "none" or not work.job.config.valid_sources:
        return
    records = [(file, record) for file, record in zip(work.inputs, make_input_records(work)) if file.bytes]
    names = {record["sha256"]: record["path"] for file, record in records if not file.valid}
    for file, record in records:
        if file.valid and record["sha256"] in names:
            raise SameTextError(
                f"{record['path']} in valid_sources and {names[record['sha256']]} in sources have the same content, and with "
                "dedup none both are kept. Remove one of them, or set --dedup exact, which keeps such text in validation only."
            )


def check_text_is_left(work: WorkingDirectory, documents: dict[str, int], dropped: int) -> None:
    """Raise SameTextError if all documents of the training split are duplicates of validation documents.

    Args:
        work: the working directory, with its duplicates.
        documents: number of each split, with duplicates.
        dropped: number of duplicates in both splits.
    """
    # As long as fewer are dropped than the split has, some are left: no row has to be read.
    if dropped < documents["train"]:
        return
    done = (part for part in work.parts if work.job.is_done(scan_record_path(work.job, part)))
    if any((read_kept_rows(work.job, part)["valid"] == 0).any() for part in done):
        return
    raise SameTextError(
        f"the train split would be empty: all {documents['train']:,} documents of sources are in validation too. Name other "
        "text in --sources or --valid_sources."
    )
