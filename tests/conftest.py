"""Its being here lets all tests import `testbed`: pytest puts this directory on the path."""
