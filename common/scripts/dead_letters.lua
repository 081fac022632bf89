#!lua flags=allow-oom
-- Dead letters, newest first, from behind a given one.
-- ARGV  1 most  2 end (ms) and  3 id of the last one seen, or '' ''
-- Reply {all that are stored, described job ...}. Those that have expired are taken off the list.
--@include base
--@include jobs
local most, before_ms, before_id = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local letters = P .. 'failed'
local all = call('ZREVRANGE', letters, 0, -1, 'WITHSCORES')
local total, found = 0, {}
for at = 1, #all, 2 do
  local id, ended = all[at], tonumber(all[at + 1])
  if call('EXISTS', P .. 'j:' .. id) == 0 then
    call('ZREM', letters, id)
  else
    total = total + 1
    local is_behind = not before_ms or ended < before_ms or (ended == before_ms and id < before_id)
    if is_behind and #found < most then found[#found + 1] = describe(load(id)) end
  end
end
return { total, unpack(found) }
