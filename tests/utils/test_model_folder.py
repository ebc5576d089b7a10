"""A saved model's folder."""

import subprocess
import sys

from tests.conftest import ROOT


def test_loading_does_not_import_the_compiler(tiny_model, tmp_path):
    """torch imports it to draw random numbers for parameters without memory: half of the time that loading took."""
    tiny_model.save_pretrained(tmp_path)
    code = f"import sys, miniclip; miniclip.load({str(tmp_path)!r}); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
