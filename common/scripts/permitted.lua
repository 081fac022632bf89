#!lua flags=no-writes,allow-oom
-- What the calling user may not do, as the server's access rules say; nothing of it is done.
-- ARGV  commands, looked up with a key of a shard, and keys (those begin with a brace), looked up with EXISTS
-- Reply {command or key ...}
--@include base
local refused = {}
for _, wanted in ipairs(ARGV) do
  local question = { wanted, KEYS[1] }
  if string.sub(wanted, 1, 1) == '{' then question = { 'exists', wanted } end
  if wanted == 'xread' then question = { 'xread', 'STREAMS', KEYS[1], '0' } end
  if wanted == 'blpop' then question = { 'blpop', KEYS[1], '0' } end
  if wanted == 'info' then question = { 'info' } end
  if not redis.acl_check_cmd(unpack(question)) then refused[#refused + 1] = wanted end
end
return refused
