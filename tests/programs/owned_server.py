"""Own a stand-in for a rollout server and wait: owned_server.py LOG. Prints the address and the group's number."""

import sys
import time
from pathlib import Path

from fixtures.launching import wait_until
from fixtures.stand_in_server import stand_in

server = stand_in(Path(sys.argv[1]))
server.start()
wait_until(server.is_ready, 30, "the server answers")
sys.stdout.write(f"{server.url} {server.process_group}\n")
sys.stdout.flush()
time.sleep(600)
