"""Import every package of the installed wheel, and only that, with the core dependencies alone."""

import importlib
import importlib.metadata
import pathlib
import sys

files = importlib.metadata.files("pyro_vi_ext")
modules = [f for f in files if f.suffix == ".py"]
top_level = {f.parts[0] for f in files if not f.parts[0].endswith(".dist-info")}
if top_level != {"pyro_vi_ext"}:
    sys.exit(f"the wheel owns {sorted(top_level)}, it should own pyro_vi_ext alone")
packages = sorted({".".join(f.parts[:-1]) for f in modules if f.name == "__init__.py"})
extras = []
for package in packages:
    try:
        module = importlib.import_module(package)
    except ImportError as error:  # a package of an extra says which, and that is all it may do here
        if "pip install pyro_vi_ext[" not in str(error):
            raise
        extras.append(package)
        continue
    location = pathlib.Path(module.__file__).resolve()
    if "site-packages" not in location.parts:
        sys.exit(f"{package} was imported from {location}, not from the wheel")
loaded = {"jax", "arviz", "arviz_base", "matplotlib"} & set(sys.modules)
if loaded:
    sys.exit(f"importing the packages loaded {sorted(loaded)}, which are extras")
imported = [package for package in packages if package not in extras]
print("wheel: imported", ", ".join(imported), "-", len(modules), "modules")
print("wheel: asked for their extras:", ", ".join(extras))
