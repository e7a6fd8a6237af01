"""An object store of S3's protocol on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import fsspec

BUCKET = "bucket"


@contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """Within the block s3:// is a server of this process, with an empty bucket.

    Gives the variables by which other processes reach it.
    """
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",
    }
    try:
        with mock.patch.dict(os.environ, variables):
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
            yield variables
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        server.stop()
