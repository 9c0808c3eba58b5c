"""The back ends that ship with fofa-deploy, one file each; a module is imported only when its back end is named."""
