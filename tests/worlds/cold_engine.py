"""What is started cold in a snapshot's place: it is ready at once, and says what it is. `python -m tests.worlds.cold_engine PORT`."""

import sys
from http import HTTPStatus

from tests.worlds.json_answers import json_server

if __name__ == "__main__":
    json_server(int(sys.argv[1]), lambda path: (HTTPStatus.OK, {"cold": True})).serve_forever()
