#!lua flags=allow-oom
-- What a worker holds on the server but does not know of: the reply to its claim was lost.
-- ARGV  1 worker  2 most jobs  3 most bytes  then ids that it knows
-- Reply {claimed job ...}
--@include base
--@include jobs
--@include claims
local now, found, bytes = now_ms(), {}, tonumber(ARGV[3])
local known = {}
for i = 4, #ARGV do known[ARGV[i]] = true end
for _, id in ipairs(call('HKEYS', P .. 'w:' .. ARGV[1])) do
  if #found == tonumber(ARGV[2]) then break end
  local j = not known[id] and load(id)
  if j then
    bytes = bytes - claim_bytes(j)
    if bytes < 0 and #found > 0 then break end
    found[#found + 1] = pack_claim(j, now)
  end
end
return found
